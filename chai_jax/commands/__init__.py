"""The commands. Heavy libraries are imported inside them, so that --help answers at once."""
