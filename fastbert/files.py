"""Locks on directories, atomic writes, hashes and manifests."""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath

from filelock import FileLock, Timeout

MANIFEST = "MANIFEST.json"


@contextlib.contextmanager
def lock(directory):
    """Lock `directory` for this process, and create it if needed. Its file .lock.pid has the process id.

    The operating system drops the lock when the process ends for any reason. Raises ValueError with the id of the
    process that holds the lock, OSError if the directory cannot be written.
    """
    directory = Path(directory)
    # not in the lock file: on Windows other processes cannot read a locked file
    holder, held = directory / ".lock.pid", FileLock(directory / ".lock")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held.acquire(timeout=0)
    except Timeout:
        try:
            process = holder.read_text(encoding="utf-8").strip() or "unknown"
        except OSError:
            process = "unknown"
        raise ValueError(f"{directory} is in use by a live run, process {process}") from None
    except OSError as error:
        raise OSError(f"{directory} cannot be written: {error.strerror}") from None
    try:
        write(holder, f"{os.getpid()}\n")
        yield
    finally:
        holder.unlink(missing_ok=True)
        held.release()


@contextlib.contextmanager
def unused(directory):
    """Hold the lock of `directory` and of those above it, where they have one. Raises ValueError while a run goes on.

    For a command that writes into a directory of the user's choice, and leaves no lock of its own.
    """
    path = Path(directory).absolute()
    with contextlib.ExitStack() as held:
        for folder in (path, *path.parents):
            # other programs have files named .lock
            if (folder / ".lock.pid").exists():
                # a directory that cannot be written has no run
                with contextlib.suppress(OSError):
                    held.enter_context(lock(folder))
        yield


def write(path, data):
    """Replace the content of `path` by text, bytes or a list of buffers.

    A crash leaves either the old content or the new. Raises a one-line OSError if the file cannot be written.
    """
    path = Path(path)
    building = path.with_name(path.name + ".tmp")
    try:
        data = data.encode() if isinstance(data, str) else data
        with open(building, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
        sync(building)
        building.replace(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            building.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error.strerror}") from None


def sync(path):
    """Force a file, or a directory's entries, to the disk."""
    is_directory = os.path.isdir(path)
    if is_directory and os.name == "nt":
        # Windows cannot open a directory
        return
    descriptor = os.open(path, os.O_RDONLY if is_directory else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path):
    """The sha256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def is_sha256(value):
    """Whether a value read from a file is a sha256 in hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def read_json(path, kind=dict):
    """The JSON object in a file, or the array with kind=list. Raises ValueError with the path for anything else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    # RecursionError: brackets within brackets
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path} holds no JSON {'object' if kind is dict else 'array'}")
    return value


def inside(directory, name):
    """directory / name, for a name that was read from a file. Raises ValueError for a path outside the directory."""
    # JSON can hold half a surrogate pair, which is no character
    if not isinstance(name, str) or "\0" in name or name.encode(errors="ignore").decode() != name:
        raise ValueError(f"{directory} names the file {name!r}: expected the path of one")
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.is_absolute() or path.drive or path.root or ".." in path.parts:
            raise ValueError(f"{directory} names the file {name!r}: expected one inside the directory")
    return Path(directory) / name


def all_files(directory):
    """The files of a directory and its subdirectories, sorted."""
    return sorted(path for path in Path(directory).rglob("*") if path.is_file())


def write_manifest(directory):
    """Write MANIFEST.json for all files of `directory`. Everything is forced to the disk, the manifest last."""
    directory = Path(directory)
    files = [path for path in all_files(directory) if path != directory / MANIFEST]
    for path in (*files, *{path.parent for path in files}):
        sync(path)
    manifest = {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    sync(directory / MANIFEST)
    sync(directory)


def verify_manifest(directory, required=()):
    """Raises ValueError with the file and the fault unless every file of `directory` matches its manifest.

    required: names that the manifest must list.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"{directory} has no {MANIFEST}: it was not finished")
    manifest = read_json(path)
    try:
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from None
    missing = [name for name in required if name not in expected]
    if missing:
        raise ValueError(f"{path} does not list {missing[0]}")
    for name, (size, digest) in expected.items():
        file = inside(directory, name)
        if type(size) is not int or not is_sha256(digest):
            raise ValueError(f"{path} has no size or no sha256 for {name}: it is damaged")
        # False for a name that no file can have
        if not os.path.isfile(file):
            raise ValueError(f"{file} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size} bytes: {size} were written")
        if sha256(file) != digest:
            raise ValueError(f"{file} is damaged: its sha256 is not the one that was written")
