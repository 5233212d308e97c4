"""Where a model comes from: the one in the box, a local folder, or the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from khala_mlx.errors import KhalaError


def find_model(source: str | Path) -> Path:
    """The folder of a model: the one in the box, a local folder, or a Hub snapshot."""
    if source == "demo":
        folder = Path(__file__).parent / "demo"
        if not (folder / "config.json").is_file():
            raise KhalaError(
                "This version brings no model of its own yet: convert the released weights with "
                "`khala convert` and name the folder with --model."
            )
        return folder
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise KhalaError(
                f"{path} is no model folder, it has no config.json; checkpoints are turned into "
                f"one by `khala convert {path} DEST`."
            )
        return path
    if path.exists():
        raise KhalaError(f"{path} is a file; a model is a folder made by `khala convert`.")
    return _download(str(source))


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if repo.count("/") != 1:
        raise KhalaError(f"There is no model folder {repo}, nor a Hub repository of that name.")
    try:
        folder = Path(snapshot_download(repo, allow_patterns=["*.json", "*.safetensors", "*.md"]))
    except HFValidationError as error:
        raise KhalaError(
            f"There is no model folder {repo}, nor a Hub repository of that name."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise KhalaError(f"{repo} cannot be fetched from the Hub: {reason}") from error
    if not (folder / "config.json").is_file():
        raise KhalaError(
            f"{repo} holds no converted model; turn its checkpoints into one with "
            f"`khala convert {repo} DEST`."
        )
    return folder
