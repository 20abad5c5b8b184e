"""From what a person calls a model (a folder, a GGUF file, an id on the Hugging Face hub) to a path on this machine."""

from collections.abc import Iterable
from pathlib import Path

from chai_jax.errors import InputError
from chai_jax.files.gguf.model import SUFFIX, is_gguf
from chai_jax.files.weights import FORMATS
from chai_jax.inputs.paths import user_path
from chai_jax.inputs.reading import shown

SMALL_FILES = ("*.json", "*.jinja", "merges.txt", "README.md", "LICENSE*")


def resolve(source: str | Path, revision: str | None = None) -> Path:
    """The folder or the .gguf file `source`, or the folder of a hub id in Hugging Face's cache, downloaded if need be.

    Only the files needed are fetched: weights in one format, tokenizer, configuration, licence. The variables of
    huggingface_hub (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, ...) apply. Without network, what is in the cache is used.

    Raises:
        InputError: no such folder or id, or no path that can be; a revision of a folder or a file; the hub out of reach
            and the id not in the cache.
    """
    path = user_path(source)
    if path.is_dir() or is_gguf(path):
        if revision is not None:
            kind = "folder" if path.is_dir() else "file"
            raise InputError(
                f"{shown(source)} is a {kind}, which has no revision {revision!r}; expected a hub id: leave it out"
            )
        return path
    if path.exists():
        raise InputError(
            f"{shown(source)} is a file; expected a model folder, a {SUFFIX} file or a hub id: give the folder it is in"
        )
    if isinstance(source, Path):
        raise _nothing(source)
    return _download(source, revision)


def _nothing(source: str | Path) -> InputError:
    return InputError(
        f"there is no folder {shown(source)}; expected a model folder or a hub id such as facebook/opt-125m"
    )


def cached(repo: str, revision: str | None = None) -> Path | None:
    """The folder in which the cache holds (files of) a hub id, without asking the hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(repo, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        files = HfApi().model_info(repo, revision=revision).siblings or []
        return Path(snapshot_download(repo, revision=revision, allow_patterns=needed(file.rfilename for file in files)))
    except HFValidationError:
        raise _nothing(repo) from None
    except RevisionNotFoundError:
        raise InputError(
            f"{repo} has no revision {revision!r} on the hub; expected a branch, tag or commit of it"
        ) from None
    except GatedRepoError:
        raise InputError(f"{repo} is gated on the hub; accept its terms there and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"there is no folder {repo} here, and on the hub no public model of that name; check the name, or set "
            "HF_TOKEN where it is private"
        ) from None
    # Offline, no network, no hub: the errors are those of the client's transport, another library from version to
    # version. Whatever the reason, what is in the cache will do.
    except Exception as error:
        folder = cached(repo, revision)
        if folder is None:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"there is no folder {repo} here, it is not in Hugging Face's cache, and the hub cannot be reached "
                f"({reason:.200}); give a folder, or connect"
            ) from None
        return folder


def needed(files: Iterable[str]) -> list[str]:
    """Patterns of the files of a repository to fetch: the small ones, and weights in the format we read first."""
    names = set(files)
    for kind in FORMATS:
        if {kind.file, f"{kind.file}.index.json"} & names:
            stem, _, extension = kind.file.rpartition(".")
            whole = [kind.file] if kind.file in names else [f"{stem}-*.{extension}"]
            return [*SMALL_FILES, *whole]
    return list(SMALL_FILES)
