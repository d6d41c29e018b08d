"""A run's adapter or merged model as a repository on the Hugging Face hub: listed first, uploaded when asked to."""

from __future__ import annotations

from pathlib import Path

from fast_ft.common.errors import InputError
from fast_ft.models.adapter_check import FILE as SELFCHECK

#: Never uploaded: it holds the tokens of training rows.
LEFT_OUT = (SELFCHECK,)


def files(folder: Path) -> list[Path]:
    """Return what of a folder would be uploaded, in order of name."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if path.name not in LEFT_OUT and not path.name.startswith(".")]


def upload(folder: Path, repository: str) -> str:
    """Upload a folder into a private repository, made where there is none; return its address.

    Raises:
        InputError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        allowed = [path.relative_to(folder).as_posix() for path in files(folder)]
        done = api.upload_folder(folder_path=str(folder), repo_id=repository, allow_patterns=allowed)
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{repository}: the hub did not take the upload ({said}). Log in with `hf auth login`, or set HF_TOKEN to "
            "a token that may write; then run the command again"
        ) from None
    return str(done.commit_url)
