"""The directory that a conversion fills, and how it takes its place in one step.

Everything is written to ``.<name>.partial`` beside the target and renamed at the end, so that a
crash, a full disk or a kill leaves the old state or the new one. ``.<name>.partial.lock`` is locked
meanwhile; the lock dies with its holder. What a killed conversion leaves is taken up by the next
one of the same source and options, or removed by any other.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from sllmctl.core.checkpoint import STATE_NAME, SUFFIX
from sllmctl.core.fileio import errno_text
from sllmctl.core.manifest import MANIFEST_NAME, ShardDigest
from sllmctl.core.oscalls import exchange, rename_new, sync_directory
from sllmctl.core.sllm_store import INDEX_NAME as SLLM_INDEX_NAME
from sllmctl.errors import CheckpointError, ConfigError

_MODEL_FILES = {MANIFEST_NAME, SLLM_INDEX_NAME, "config.json", "tokenizer_config.json"}
"""A directory with one of these is a model's: a tokenizer may be saved before its weights."""
_FORCE_HINT = "replace it with --force, or choose another place with --output"

log = logging.getLogger(__name__)


class Target:
    """A checkpoint directory in the making; use it with ``with``.

    Attributes:
        directory: Where to write.
        done: Shards that an earlier, killed conversion completed, by name.
    """

    def __init__(self, path: Path, *, fingerprint: str, force: bool) -> None:
        """Lock the target, mend what a crash left, and prepare the partial directory.

        Args:
            path: The final directory.
            fingerprint: Identifies source and options.
            force: Replace a checkpoint that is there.

        Raises:
            ConfigError: Something is there that may not be replaced, or another conversion
                into it is running.
            CheckpointError: The place cannot be written.
        """
        # Through a symbolic link to a directory the directory itself is replaced, not the link.
        self._path = Path(os.path.realpath(path))
        self._force = force
        name, parent = self._path.name, self._path.parent
        self.directory = parent / f".{name}.partial"
        self._old = parent / f".{name}.partial.old"
        self._lock_path = parent / f".{name}.partial.lock"
        self.done: dict[str, ShardDigest] = {}
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._lock_fd = self._lock()
        except OSError as exc:
            raise CheckpointError(f"cannot write to `{parent}`: {errno_text(exc)}") from exc
        try:
            self._mend()
            require_replaceable(self._path, force=force)
            self._take_up(fingerprint)
        except OSError as exc:
            self._release()
            raise CheckpointError(f"cannot write to `{parent}`: {errno_text(exc)}") from exc
        except KeyboardInterrupt:
            self.__exit__(None, None, None)
            raise
        except BaseException:
            self._release()
            raise

    def record(self, digest: ShardDigest) -> None:
        """Note that a shard is complete and on disk: a later conversion may keep it."""
        with (self.directory / STATE_NAME).open("a") as state:
            state.write(json.dumps(asdict(digest)) + "\n")
            state.flush()
            os.fsync(state.fileno())

    def publish(self) -> None:
        """Put the directory in its place. Its files are on disk already.

        Raises:
            ConfigError: Something has appeared at the target meanwhile.
            CheckpointError: It cannot be renamed.
        """
        try:
            (self.directory / STATE_NAME).unlink()
            for parent, _, _ in os.walk(self.directory):
                sync_directory(Path(parent))
            self._swap()
            sync_directory(self._path.parent)
        except (FileExistsError, NotADirectoryError) as exc:
            raise _exists(self._path) from exc
        except OSError as exc:
            if exc.errno == errno.ENOTEMPTY:
                raise _exists(self._path) from exc
            raise CheckpointError(
                f"cannot put `{self._path}` in its place: {errno_text(exc)}"
            ) from exc

    def _swap(self) -> None:
        if not self._path.exists():
            if not rename_new(self.directory, self._path):
                self.directory.rename(self._path)
        elif not self._force:
            # An empty directory is replaced by this; anything else refuses.
            self.directory.rename(self._path)
        elif not exchange(self.directory, self._path):
            self._path.rename(self._old)
            self.directory.rename(self._path)

    def _lock(self) -> int:
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(self._lock_path, flags, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
                os.close(fd)
                raise ConfigError(
                    f"another conversion into `{self._path}` is running (pid {holder})",
                    hint="wait for it, or end it; a lock ends with its process",
                ) from None
            except OSError as exc:
                if exc.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                    os.close(fd)
                    raise
                log.warning("`%s` cannot be locked: %s", self._lock_path, errno_text(exc))
            # The last holder may have removed the file between our open and our lock.
            try:
                current = self._lock_path.stat().st_ino
            except FileNotFoundError:
                current = None
            if current == os.fstat(fd).st_ino:
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                return fd
            os.close(fd)

    def _mend(self) -> None:
        """Undo the first of two renames if the second never came; remove what was replaced."""
        if self._old.exists():
            if self._path.exists():
                remove_tree(self._old)
            else:
                self._old.rename(self._path)

    def _take_up(self, fingerprint: str) -> None:
        kept = _read_state(self.directory, fingerprint)
        if not kept:
            remove_tree(self.directory)
        self.directory.mkdir(exist_ok=True)
        for entry in self.directory.iterdir():
            digest = kept.get(entry.name)
            if digest is not None and entry.is_file() and entry.stat().st_size == digest.size:
                self.done[entry.name] = digest
            else:
                remove_tree(entry)
        with (self.directory / STATE_NAME).open("w") as state:
            state.write(json.dumps({"fingerprint": fingerprint}) + "\n")
        for digest in self.done.values():
            self.record(digest)

    def _release(self) -> None:
        # In this order: whoever locks a file that is gone from the path tries again.
        with suppress(OSError):
            self._lock_path.unlink()
        os.close(self._lock_fd)

    def __enter__(self) -> Target:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            # After an exchange this is the checkpoint that was replaced.
            remove_tree(self.directory)
            self._mend()
        except OSError as exc:
            log.warning("cannot clean up beside `%s`: %s", self._path, errno_text(exc))
        finally:
            self._release()


def require_replaceable(path: Path, *, force: bool) -> None:
    """Check that a conversion may end at a path.

    Raises:
        ConfigError: Something is there, and ``force`` is not given; or it is no checkpoint, or
            a mount point, which are never replaced.
        CheckpointError: It cannot be read.
    """
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise ConfigError(f"`{path}` exists and is not a directory")
    if path.is_mount():
        raise ConfigError(
            f"`{path}` is a mount point and cannot be replaced",
            hint="choose a directory inside it",
        )
    try:
        names = [entry.name for entry in path.iterdir()]
    except OSError as exc:
        raise CheckpointError(f"cannot look at `{path}`: {errno_text(exc)}") from exc
    if not names:
        return
    if not force:
        raise _exists(path)
    if not _MODEL_FILES.intersection(names) and not any(name.endswith(SUFFIX) for name in names):
        raise ConfigError(
            f"`{path}` holds {len(names)} entries and no model: it is not replaced",
            hint="choose another place with --output, or remove it yourself",
        )


def remove_tree(path: Path) -> None:
    """Remove a file, a link or a directory with all in it; nothing there is fine."""
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _exists(path: Path) -> ConfigError:
    return ConfigError(f"`{path}` is there already", hint=_FORCE_HINT)


def _read_state(directory: Path, fingerprint: str) -> dict[str, ShardDigest]:
    """Read which shards are complete; none if the state is of another conversion or torn."""
    kept: dict[str, ShardDigest] = {}
    try:
        first, *rest = (directory / STATE_NAME).read_text().splitlines()
        if json.loads(first) != {"fingerprint": fingerprint}:
            return {}
        for line in rest:
            digest = ShardDigest(**json.loads(line))
            kept[digest.name] = digest
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as exc:
        # A kill can tear the last line; the lines before it hold.
        log.info("state of `%s` ends early: %s", directory, exc)
    return kept
