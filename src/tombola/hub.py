"""What goes to the Hub: a shipped model or a ticket with its card, when the user says so."""

import shutil
from pathlib import Path

from tombola.errors import SettingsError, TombolaError
from tombola.export import published, refuse


def push_to_hub(folder: Path | str, repo_id: str, *, private: bool = True, dry_run: Path | str | None = None) -> str:
    """Uploads what `ship` wrote, or a ticket's folder, to the Hub repository `repo_id`, and returns its address.

    Private unless told otherwise. dry_run: a new folder, into which exactly the files go that would be uploaded; nothing is sent.
    Hidden files and links stay behind. Raises: SettingsError for a folder that is neither, or a bad name of a repository.
    """
    folder = Path(folder)
    files = hub_files(folder, repo_id)
    if dry_run is not None:
        refuse(Path(dry_run), "hf", code=False)
        with published(Path(dry_run)) as copy:
            for file in files:
                (copy / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / file, copy / file)
        return str(dry_run)
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=str(folder), allow_patterns=[str(file) for file in files])
    return str(url)


def hub_files(folder: Path, repo_id: str) -> list[Path]:
    """The files of a shipped model or a ticket that go to the Hub, relative to the folder. Raises: SettingsError."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    problems = []
    marks = ("ticket.json", "ticket/ticket.json")
    if not folder.is_dir() or not any((folder / mark).is_file() for mark in marks) or not (folder / "README.md").is_file():
        problems.append(
            TombolaError(
                f"{folder} is nothing that can be pushed",
                got=sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else "no such folder",
                expected="what tombola ship wrote, or a ticket's folder",
            )
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        problems.append(TombolaError("this is no name of a Hub repository", got=repo_id, expected=f"name/of-it: {error}"))
    if problems:
        raise SettingsError(problems)
    found = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    return [path for path in found if not any(part.startswith(".") for part in path.parts)]
