"""Files are replaced whole or not at all, appended to durably, and what the file system refuses is one sentence."""

import errno
import os
import stat
import subprocess
import sys
import threading

import pytest

from mpsearch.errors import InputError
from mpsearch.files import append_durably, file_errors, read_regular, write_atomically


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def failing(monkeypatch):
    """`failing("write", errno.ENOSPC)`: that call of `os` fails from now on."""

    def fail(call, number):
        def raises(*_, **__):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, call, raises)

    return fail


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "page.md"
    write_atomically(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "new \ud800")
    assert file.read_text() == "old"
    write_atomically(file, b"new")
    assert file.read_text() == "new"
    assert listing(tmp_path) == ["page.md"]


@pytest.mark.parametrize("call", ["ftruncate", "write", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_no_temporary(tmp_path, failing, call):
    file = tmp_path / "page.md"
    write_atomically(file, "old")
    failing(call, errno.ENOSPC)
    with pytest.raises(InputError, match=rf"{file} cannot be written: no space is left on the disk\. Free some space, then run"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert listing(tmp_path) == ["page.md"]


def test_an_interrupt_leaves_no_temporary(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "page.md", "new")
    assert listing(tmp_path) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_mode_follows_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "a", "")
        append_durably(tmp_path / "b", "")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"] == [mode, mode]


def test_temporaries_of_killed_writers_do_not_accumulate(tmp_path):
    code = (
        "import os, signal, sys; from mpsearch.files import write_atomically\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(sys.argv[1], 'x' * 100_000)"
    )
    file = tmp_path / "page.md"
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code, str(file)], check=False).returncode == -9
        assert listing(tmp_path) == [".page.md.tmp"]
    write_atomically(file, "short")
    assert file.read_text() == "short"
    assert listing(tmp_path) == ["page.md"]


def test_concurrent_writers_of_a_file_do_not_mix(tmp_path):
    file = tmp_path / "page.md"
    contents = [letter * 50_000 for letter in "abcdefgh"]

    def write(content):
        for _ in range(5):
            write_atomically(file, content)
            assert file.read_text() in contents

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read_text() in contents
    assert listing(tmp_path) == ["page.md"]


def test_a_temporary_that_is_a_link_is_not_followed(tmp_path):
    """As a folder from elsewhere may hold it."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".page.md.tmp").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match=r"page.md cannot be written: it is a symbolic link"):
        write_atomically(tmp_path / "page.md", "new")
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("written", [0, 3])
def test_a_row_that_the_disk_refuses_is_cut_back(tmp_path, monkeypatch, written):
    file = tmp_path / "rows.csv"
    append_durably(file, "a,b\n")
    write = os.write

    def partly(descriptor, data):
        if len(data) < 5:
            raise OSError(errno.ENOSPC, "full")
        return write(descriptor, data[:written]) if written else partly(descriptor, b"")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", partly)
        with pytest.raises(InputError, match=r"rows.csv cannot be written: no space"):
            append_durably(file, "1,2,3\n")
    assert file.read_text() == "a,b\n"
    append_durably(file, "1,2\n")
    assert file.read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "no space is left on the disk"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EFBIG, "the file would exceed the largest size"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission is denied"),
        (errno.ENOENT, "the file or its folder does not exist"),
        (errno.EIO, "the disk reports an input/output error"),
        (errno.ENAMETOOLONG, "File name too long"),
    ],
)
def test_each_error_is_one_sentence(number, sentence):
    with pytest.raises(InputError) as caught, file_errors("a/b.csv", "read"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).startswith(f"a/b.csv cannot be read: {sentence}")
    assert "\n" not in str(caught.value)


def test_a_vanished_folder_is_named(tmp_path):
    for write in (write_atomically, append_durably):
        with pytest.raises(InputError, match=r"gone/page.md cannot be written: the file or its folder does not exist"):
            write(tmp_path / "gone" / "page.md", "new")
    with pytest.raises(InputError, match=r"cannot be written: it is a folder"):
        write_atomically(tmp_path, "new")


def test_only_regular_files_are_read(tmp_path):
    write_atomically(tmp_path / "a", b"\x00\xff")
    assert read_regular(tmp_path / "a") == b"\x00\xff"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(InputError, match=r"is not a regular file|it is a folder"):
            read_regular(path)
    with pytest.raises(InputError, match="cannot be read: the file or its folder does not exist"):
        read_regular(tmp_path / "gone")
