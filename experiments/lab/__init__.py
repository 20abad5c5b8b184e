"""What the experiments share, in the order data flows: options, the tree of stages, rows over seeds, files."""
