"""Upload an exported folder to the hub, through huggingface_hub, or say what would go."""

from __future__ import annotations

from pathlib import Path

from loratune.config.secrets import redact_text
from loratune.console import say
from loratune.errors import ConfigError, StorageError
from loratune.units import byte_size


def check_repository(name: str) -> None:
    """Check that a name is one of a repository on the hub.

    Raises:
        ConfigError: if it is not ``USER/NAME``.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        cause = f"'{name}' is not a repository"
        raise ConfigError(cause, where="push", fix="write it as push=USER/NAME")


def push(folder: Path, repository: str, *, private: bool = True, dry_run: bool = False) -> None:
    """Upload every file of a published folder in one commit; print what went, or would go.

    A repository that exists keeps its visibility; where that is public, nothing is uploaded as
    private.  Token, endpoint and proxies are huggingface_hub's own: ``hf auth login``,
    ``HF_TOKEN``, ``HF_ENDPOINT``.

    Raises:
        ConfigError: if the hub refuses, nobody is logged in, or the repository is public although
            it is to be private.
        StorageError: if the hub cannot be reached.
    """
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    verb = "would go" if dry_run else "goes"
    kind = "private" if private else "public"
    for path in paths:
        say(f"  {path.name}: {byte_size(path.stat().st_size)}")
    say(f"{len(paths)} files: {verb} from {folder} to {repository} ({kind})")
    if dry_run:
        say("nothing was sent: push_dry_run=true")
        return
    say(f"pushed: {_uploaded(folder, repository, private=private)}")


def _uploaded(folder: Path, repository: str, *, private: bool) -> str:
    """The commit's address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    api = HfApi(library_name="loratune")
    kept = f"the export stays in {folder}"
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        is_public = private and not api.model_info(repository).private
        if is_public:
            raise ConfigError(
                f"{repository} exists and is public",
                where="push",
                fix=f"make it private on the hub, or set push_private=false; {kept}",
            )
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload from loratune"
        )
    except ConfigError:
        raise
    except OfflineModeIsEnabled as error:
        fix = "unset HF_HUB_OFFLINE, or set push_dry_run=true"
        raise ConfigError("HF_HUB_OFFLINE keeps the hub away", where="push", fix=fix) from error
    except LocalTokenNotFoundError as error:
        fix = f"hf auth login, or set HF_TOKEN; {kept}"
        raise ConfigError("nobody is logged in to the hub", where="push", fix=fix) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        cause = f"the hub refuses with status {status}: {_first_line(error)}"
        fix = f"hf auth login with a token that may write to {repository}; {kept}"
        kind = ConfigError if status in (400, 401, 403, 404, 409) else StorageError
        raise kind(cause, where="push", fix=fix) from error
    except Exception as error:  # its HTTP library's own: another one in each version
        cause = f"the hub cannot be reached: {_first_line(error)}"
        raise StorageError(cause, where="push", fix=f"try again later; {kept}") from error
    return str(commit.commit_url)


def _first_line(error: Exception) -> str:
    lines = redact_text(str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
