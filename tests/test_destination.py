"""The output folder: all or nothing, whatever happens to the process that writes it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from llama_export.errors import LlamaExportError, UsageError
from llama_export.export import destination
from llama_export.export.destination import check_destination, require_space, staged

MODES = ("exchange", "aside")
"""How a bundle is replaced: where renameat2 can exchange two names, and where it cannot."""


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "aside":
        monkeypatch.setattr(destination, "_exchange", lambda *_: False)
    return str(request.param)


def write_bundle(folder: Path, version: int) -> None:
    """What counts as a bundle here: a manifest, and data that must be of the same version and complete."""
    (folder / "model.onnx.data").write_bytes(version.to_bytes(4, "little") * 5000)
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text(str(version))
    manifest = {"schema_version": 1, "dialect": "ort", "files": {}, "version": version}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def version_of(folder: Path) -> int:
    """The version of a bundle; fails when its files disagree."""
    version = int(json.loads((folder / "manifest.json").read_text())["version"])
    assert (folder / "model.onnx.data").read_bytes() == version.to_bytes(4, "little") * 5000
    assert (folder / "sub" / "file").read_text() == str(version)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.onnx.data", "sub"]
    return version


def build(place: Path, version: int, *, force: bool = False) -> None:
    with staged(place, force=force) as folder:
        write_bundle(folder, version)


def test_a_new_bundle_appears_when_the_block_ends(tmp_path: Path) -> None:
    place = tmp_path / "not" / "there" / "yet"
    with staged(place, force=False) as folder:
        assert folder.is_dir()
        assert not any(folder.iterdir())
        write_bundle(folder, 1)
        assert not place.exists()
    assert version_of(place) == 1
    assert list(place.parent.iterdir()) == [place]


def test_an_empty_folder_becomes_the_bundle(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    build(tmp_path / "out", 3)
    assert version_of(tmp_path / "out") == 3


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "like").mkdir()
    build(tmp_path / "out", 1)
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "like").stat().st_mode


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere" / "real")
    build(tmp_path / "out", 1)
    build(tmp_path / "out", 2, force=True)
    assert (tmp_path / "out").is_symlink()
    assert version_of(tmp_path / "elsewhere" / "real") == 2


def test_force_replaces_a_bundle_and_leaves_nothing_of_it(tmp_path: Path, mode: str) -> None:
    build(tmp_path / "out", 1)
    (tmp_path / "out" / "engine").mkdir()
    with staged(tmp_path / "out", force=True) as folder:
        write_bundle(folder, 2)
        assert (tmp_path / "out" / "engine").is_dir()
    assert version_of(tmp_path / "out") == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_bundle_without_force_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "out", 1)
    with pytest.raises(UsageError, match=r"holds a bundle already; pass --force"):
        build(tmp_path / "out", 2)
    assert version_of(tmp_path / "out") == 1


@pytest.mark.parametrize("content", ["notes.txt", "manifest.json"])
def test_a_folder_of_somebody_else_is_never_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / content).write_text('{"manifest_version": 3, "name": "a browser extension"}')
    with pytest.raises(UsageError, match=r"other content than a bundle, which is never replaced"):
        build(tmp_path / "out", 2, force=True)
    assert (tmp_path / "out" / content).exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("where", ["out", "out/in/it"])
def test_a_file_in_the_way_is_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(UsageError, match=rf"as {tmp_path}/out is a file; name another folder"):
        build(tmp_path / where, 1, force=True)
    assert (tmp_path / "out").read_text() == "precious"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_the_current_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in (Path(), tmp_path, Path("/")):
        with pytest.raises(UsageError, match="is the current folder or one above it"):
            check_destination(path, force=True)


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "out")
    with pytest.raises(UsageError, match="name another folder"):
        build(tmp_path / "out", 1)


def test_a_folder_that_cannot_be_written_is_refused() -> None:
    # /proc refuses new folders to everybody, also to root, which tests often run as.
    if not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    for path in ("/proc/out", "/proc/out/bundle"):
        with pytest.raises(UsageError, match=r"cannot be written: .*; name a folder that you may write to"):
            build(Path(path), 1)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError, SystemExit])
@pytest.mark.parametrize("exists", [True, False])
def test_a_failed_build_leaves_the_destination_as_it_was(
    tmp_path: Path, failure: type[BaseException], exists: bool
) -> None:
    place = tmp_path / "deep" / "out"
    if exists:
        build(place, 1)
    with pytest.raises(failure), staged(place, force=True) as folder:
        write_bundle(folder, 2)
        raise failure
    if exists:
        assert version_of(place) == 1
        assert list(place.parent.iterdir()) == [place]
    else:
        assert not any(tmp_path.iterdir())


def test_a_replacement_that_fails_half_way_restores_the_old_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "out", 1)
    monkeypatch.setattr(destination, "_exchange", lambda *_: False)
    rename = Path.rename

    def refuse_new(self: Path, target: Path) -> Path:
        if self.name == "bundle":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(LlamaExportError, match=r"cannot be put to .*out: Input/output error"):
        build(tmp_path / "out", 2, force=True)
    assert version_of(tmp_path / "out") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_an_old_bundle_that_cannot_be_restored_is_kept_for_the_next_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "out", 1)
    monkeypatch.setattr(destination, "_exchange", lambda *_: False)
    rename = Path.rename

    def refuse_all_but_first(self: Path, target: Path) -> Path:
        if target.name != "old":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse_all_but_first)
        with pytest.raises(LlamaExportError):
            build(tmp_path / "out", 2, force=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="holds a bundle already"):
        build(tmp_path / "out", 3)
    assert version_of(tmp_path / "out") == 1


def test_a_folder_that_appears_during_the_build_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds a bundle already"), staged(tmp_path / "out", force=False) as folder:
        write_bundle(folder, 2)
        (tmp_path / "out").mkdir()
        write_bundle(tmp_path / "out", 1)
    assert version_of(tmp_path / "out") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_second_build_to_the_same_place_is_refused(tmp_path: Path) -> None:
    with staged(tmp_path / "out", force=True) as folder:
        write_bundle(folder, 1)
        with pytest.raises(UsageError, match="Another build is writing"):
            build(tmp_path / "out", 2, force=True)
        build(tmp_path / "out2", 2)
        build(tmp_path / "other", 2)
    assert version_of(tmp_path / "out") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out", "out2"]


def test_of_builds_that_start_together_one_wins(tmp_path: Path) -> None:
    start, results = threading.Barrier(8), []

    def one(version: int) -> None:
        start.wait()
        try:
            with staged(tmp_path / "out", force=False) as folder:
                time.sleep(0.1)
                write_bundle(folder, version)
            results.append(version)
        except UsageError as error:
            results.append(str(error))

    threads = [threading.Thread(target=one, args=(version,)) for version in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [result for result in results if isinstance(result, int)]
    assert winners == [version_of(tmp_path / "out")]
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_leftovers_of_other_names_are_not_touched(tmp_path: Path) -> None:
    others = [".out.partial", ".out.partial-x-12345678", ".out2.partial-1-12345678", ".out.partial-1-1234567"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.partial-1-aaaaaaaa").symlink_to(tmp_path / others[0])
    (tmp_path / ".out.partial-1-bbbbbbbb").mkdir()
    build(tmp_path / "out", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, ".out.partial-1-aaaaaaaa", "out"])


def test_no_space_is_told_before_anything_is_written(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there", 1)
    with pytest.raises(LlamaExportError, match=r"needs 1,125,900 GB in .*, but only [\d.,]+ .B are free there"):
        require_space(tmp_path / "not" / "there", 1 << 50)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_becomes_one_sentence(tmp_path: Path, code: int) -> None:
    full = pytest.raises(LlamaExportError, match="is full, and nothing of the bundle was kept")
    with full, staged(tmp_path / "out", force=False):
        raise OSError(code, os.strerror(code))
    assert not any(tmp_path.iterdir())


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k,nr_inodes=40", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("a tiny disk needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_really_is_full(tiny_disk: Path) -> None:
    build(tiny_disk / "out", 1)
    full = pytest.raises(LlamaExportError, match=r"The disk of .* is full, and nothing of the bundle was kept")
    with full, staged(tiny_disk / "out", force=True) as folder:
        (folder / "model.onnx.data").write_bytes(bytes(1 << 20))
    assert version_of(tiny_disk / "out") == 1
    assert list(tiny_disk.iterdir()) == [tiny_disk / "out"]
    with pytest.raises(LlamaExportError, match=r"but only [\d.]+ (kB|bytes) are free there"):
        require_space(tiny_disk, 1 << 20)


def test_a_disk_without_room_for_a_folder(tiny_disk: Path) -> None:
    with contextlib.suppress(OSError):
        for number in range(100):
            (tiny_disk / str(number)).touch()
    with pytest.raises(LlamaExportError, match="is full"):
        build(tiny_disk / "out", 1)
    assert not any(path.is_dir() for path in tiny_disk.iterdir())


def test_a_mount_point_is_refused(tiny_disk: Path) -> None:
    with pytest.raises(UsageError, match="is a mount point, which cannot be replaced; name a folder in it"):
        build(tiny_disk, 1, force=True)


CHILD = """
    import itertools, os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_destination import destination, staged, write_bundle
    exchange, rename = destination._exchange, Path.rename
    if sys.argv[2] in ("aside", "killed between"):
        destination._exchange = lambda *_: False
    if sys.argv[2] == "killed between":
        Path.rename = lambda path, to: die() if path.name == "bundle" else rename(path, to)
    if sys.argv[2] == "killed after":
        destination._exchange = lambda *paths: exchange(*paths) and die()
    def die():
        os.kill(os.getpid(), signal.SIGKILL)
    print("ready", flush=True)
    for version in itertools.count(int(sys.argv[3])):
        with staged(Path(sys.argv[1]), force=True) as folder:
            write_bundle(folder, version)
            if sys.argv[2] == "hang":
                print("hanging", flush=True)
                sys.stdin.read()
        print(version, flush=True)
"""


def start_child(place: Path, mode: str, first: int = 1) -> subprocess.Popen[str]:
    """A process that builds version after version to `place` and tells each; it is busy when this returns."""
    code = textwrap.dedent(CHILD).format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, str(place), mode, str(first)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def end_child(child: subprocess.Popen[str], number: int) -> int:
    child.send_signal(number)
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        pipe.close()
    return child.wait(timeout=20)


@pytest.mark.parametrize("mode", MODES)
def test_kill_at_random_moments(tmp_path: Path, mode: str) -> None:
    place, dice, told = tmp_path / "out", random.Random(7), 0
    build(place, 0)
    for _ in range(12):
        child = start_child(place, mode, told + 1)
        assert child.stdout is not None
        for _ in range(dice.randrange(3)):
            told = int(child.stdout.readline())
        time.sleep(dice.uniform(0, 0.02))
        assert end_child(child, signal.SIGKILL) == -signal.SIGKILL
        if mode == "aside" and not place.exists():
            # Killed between the two renames: the next build brings the old bundle back before anything else.
            with pytest.raises(UsageError, match="holds a bundle already"):
                build(place, 0)
        assert version_of(place) >= told
        told = version_of(place)
    assert told > 0
    build(place, 10**6, force=True)
    assert version_of(place) == 10**6
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize(("mode", "now", "later"), [("killed between", None, 0), ("killed after", 7, 7)])
def test_kill_at_the_worst_moments(tmp_path: Path, mode: str, now: int | None, later: int) -> None:
    place = tmp_path / "out"
    build(place, 0)
    child = start_child(place, mode, 7)
    assert child.wait(timeout=20) == -signal.SIGKILL
    end_child(child, signal.SIGKILL)
    assert (version_of(place) if place.exists() else None) == now
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    with pytest.raises(UsageError, match="holds a bundle already"):
        build(place, 9)
    assert version_of(place) == later
    build(place, 9, force=True)
    assert version_of(place) == 9
    assert list(tmp_path.iterdir()) == [place]


def test_kill_of_the_first_build_leaves_no_destination(tmp_path: Path) -> None:
    place = tmp_path / "out"
    child = start_child(place, "hang")
    assert child.stdout is not None
    assert child.stdout.readline() == "hanging\n"
    with pytest.raises(UsageError, match="Another build is writing"):
        build(place, 1)
    end_child(child, signal.SIGKILL)
    assert not place.exists()
    assert len(list(tmp_path.iterdir())) == 1
    build(place, 2)
    assert version_of(place) == 2
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_that_ask_to_end_leave_nothing(tmp_path: Path, number: signal.Signals) -> None:
    build(tmp_path / "out", 5)
    child = start_child(tmp_path / "out", "hang")
    assert child.stdout is not None
    assert child.stdout.readline() == "hanging\n"
    status = end_child(child, number)
    assert status == (-number if number == signal.SIGINT else 128 + number)
    assert version_of(tmp_path / "out") == 5
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_signal_handlers_of_others_stay(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    build(tmp_path / "out", 1)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with staged(tmp_path / "out", force=True) as folder:
            os.kill(os.getpid(), signal.SIGHUP)
            write_bundle(folder, 2)
    finally:
        signal.signal(signal.SIGHUP, old)
    assert version_of(tmp_path / "out") == 2


def test_exchange_of_two_folders(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not destination._exchange(tmp_path / "one", tmp_path / "two"):
        pytest.skip("this file system cannot exchange two names")
    assert (tmp_path / "one" / "two").exists()
    assert (tmp_path / "two" / "one").exists()
    with pytest.raises(FileNotFoundError):
        destination._exchange(tmp_path / "one", tmp_path / "absent")
