"""Which version of this code a run was made with, where it runs from a git checkout."""

import subprocess
from pathlib import Path


def git_state(folder: Path | None = None) -> dict[str, str]:
    """`commit`, `branch` and `changes` (files that differ from the commit); empty outside of one, never an error.

    `folder`: the checkout; the one this package lies in when None.
    """
    folder = folder or Path(__file__).resolve().parent

    def ask(*words: str) -> str:
        answer = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return answer.stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD"),
            "branch": ask("rev-parse", "--abbrev-ref", "HEAD"),
            "changes": ask("status", "--porcelain", "--untracked-files=no"),
        }
    except (OSError, subprocess.SubprocessError):
        return {}
