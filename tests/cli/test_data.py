"""``csmae data …``: what it prints, what it leaves behind, and with which exit status it ends."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from csmae.cli.main import main
from csmae.sensors import S1_BANDS, S2_BANDS
from tests.support.archives import FILES, bands_of, labels_of, names_of, open_folder, put, write_pickles, write_v2
from tests.support.processes import run_code
from tests.support.v1_pickles import pickled

ROOT = Path(__file__).resolve().parents[2]
BEN_14K = Path(os.environ.get("CSMAE_REAL_DATA", ROOT / "../shared/data")) / "splits/ben-14k"
S2_NAME, V1_NAME, S1_NAME = names_of(1)
REMEDY = "free some space or choose another folder"


def run(*arguments: object) -> int:
    return main(["data", *(str(argument) for argument in arguments)])


def run_limited(bytes_of_a_file: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run in a process whose files cannot grow beyond a limit, like a disk that fills up."""
    code = "import sys; from csmae.cli.main import main; sys.exit(main(['data', *sys.argv[1:]]))"
    return run_code(code, *arguments, file_bytes=bytes_of_a_file)


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_synthesize_writes_the_requested_size_and_shares(tmp_path: Path) -> None:
    assert run("synthesize", tmp_path / "new", "--size", 20, "--shares", 0.5, 0.3, 0.2, "--seed", 3) == 0
    archive = open_folder(tmp_path / "new")
    assert [len(archive.split(name)) for name in ("train", "validation", "test")] == [10, 6, 4]
    assert contents(tmp_path) == {"new"}
    assert run("check", tmp_path / "new") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shares", 0.5, 0.5, 0.5], "--shares must be positive and sum to 1"),
        (["--size", 2], "--size must leave a scene for each split: found 2"),
        (["--seed", -1], "--seed be at least 0"),
    ],
)
def test_synthesize_rejects_impossible_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[object], message: str
) -> None:
    assert run("synthesize", tmp_path / "new", *options) == 2
    assert message in capsys.readouterr().err
    assert not contents(tmp_path)


def test_synthesize_on_a_full_disk_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    ended = run_limited(4_000_000, "synthesize", tmp_path / "new", "--size", 64)
    assert ended.returncode == 2
    assert ended.stderr.strip().splitlines()[-1].startswith(f"{tmp_path / 'new'}: cannot be written: ")
    assert "Traceback" not in ended.stderr
    assert not contents(tmp_path)
    assert run("synthesize", tmp_path / "new", "--size", 8) == 0


def test_an_unwritable_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    write_pickles(tmp_path / "v1")
    for command in (("synthesize", tmp_path / "file/new"), ("convert", tmp_path / "v1", tmp_path / "file/new")):
        assert run(*command) == 2
        assert f"{tmp_path / 'file/new'}: cannot be written: " in capsys.readouterr().err


@contextmanager
def without_privileges() -> Iterator[None]:
    """Drop root's privileges for a while."""
    if os.geteuid():
        yield
        return
    "".encode(
        "utf-8-sig"
    )  # Python may not be readable without privileges, and a codec is imported when it is first used
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every account may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        path.chmod(0o755)
        yield path
        for child in path.iterdir():
            child.chmod(0o700)


@pytest.mark.parametrize(("mode", "may_be_seen"), [(0o555, True), (0o000, False)])
def test_a_folder_without_permission_is_named(
    shared: Path, capsys: pytest.CaptureFixture[str], mode: int, may_be_seen: bool
) -> None:
    write_v2(shared / "v2")
    write_pickles(shared / "v1")
    write_v2(shared / "closed/archive")
    lists = lists_of_summer(shared / "lists")
    closed = shared / "closed"
    closed.chmod(mode)
    written = [
        ("synthesize", closed / "new", "--size", 8),
        ("convert", shared / "v1", closed / "new"),
        ("splits", "ben-14k", lists, closed / "new"),
        ("show", shared / "v2", "--output", closed / "new"),
        ("check", shared / "v2", "--checksums", closed / "new"),
    ]
    read = [("check", closed / "archive"), ("stats", closed), ("splits", "ben-14k", closed / "archive", shared / "b")]
    for commands, place in ((written, closed / "new"), (() if may_be_seen else read, closed)):
        for command in commands:
            with without_privileges():
                code = run(*command)
            text = capsys.readouterr().err
            assert code == 2, text
            assert text.startswith(str(place)) and "Permission denied" in text and text.count("\n") == 1, text
    closed.chmod(0o755)
    assert contents(closed) == {"archive"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk in memory, or mounts it again, with options such as ``size=4m`` or ``ro``."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        if folder.is_mount():
            subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
            return folder
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a disk needs root")
        return folder

    yield mount
    if folder.is_mount():
        # lazily, because an archive stays open once it was opened
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("command", ["synthesize", "convert"])
def test_a_full_disk_leaves_no_archive_and_the_command_can_be_repeated(
    tmp_path: Path, disk: Callable[[str], Path], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    new = disk("size=1m") / "new"
    options = [new, "--size", 8] if command == "synthesize" else [write_pickles(tmp_path / "v1"), new]
    assert run(command, *options) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"{new}: cannot be written: ") and text.endswith(f"; {REMEDY}\n") and text.count("\n") == 1
    assert "No space left on device" in text or "a full disk?" in text
    assert not new.exists()
    disk("size=64m")
    assert run(command, *options) == 0
    assert run("check", new) == 0
    assert contents(new.parent) == {"new"}


def test_a_read_only_disk_is_named(
    tmp_path: Path, disk: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_v2(tmp_path / "v2")
    write_pickles(tmp_path / "v1")
    lists = lists_of_summer(tmp_path / "lists")
    folder = disk("ro")
    for command in (
        ("synthesize", folder / "new"),
        ("convert", tmp_path / "v1", folder / "new"),
        ("splits", "ben-14k", lists, folder / "new"),
        ("show", tmp_path / "v2", "--output", folder / "new"),
        ("check", tmp_path / "v2", "--checksums", folder / "new"),
    ):
        assert run(*command) == 2, command
        text = capsys.readouterr().err
        assert text.startswith(f"{folder / 'new'}: cannot be written: Read-only file system") and text.count("\n") == 1
    assert not contents(folder)


def lists_of_summer(folder: Path) -> Path:
    """Write split lists with one patch of BEN-14K each."""
    folder.mkdir()
    for number, file in enumerate(FILES.values()):
        (folder / file).write_text(f"S2A_MSIL2A_20170803T094031_{number}_19\n")
    return folder


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_check_accepts_an_intact_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str], version: str) -> None:
    (write_pickles if version == "v1" else write_v2)(tmp_path / "a")
    assert run("check", tmp_path / "a") == 0
    assert f"BigEarthNet {version}" in (text := capsys.readouterr().out) and "0 problems" in text


def test_check_counts_problems_and_gives_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_v2(tmp_path)
    hot = {name: np.full((120, 120), 400, np.float32) for name in S1_BANDS}
    from safetensors.numpy import save

    dark = {name: band for name, band in bands_of(2).items() if name in S2_BANDS} | {
        "B04": np.zeros((120, 120), np.uint16)
    }
    put(
        tmp_path,
        {names_of(n)[2]: b"damaged!!" for n in range(4)} | {names_of(5)[2]: save(hot), names_of(2)[0]: save(dark)},
    )
    lists = tmp_path / "lists"
    lists.mkdir()
    for file in ("train.csv", "val.csv"):
        (lists / file).write_text(f"{S2_NAME}\n")
    (lists / "test.csv").write_text("nowhere\n")
    assert run("check", tmp_path, "--splits-dir", lists) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("8 problems")
    assert lines[1] == "4 ×" and lines[5] == "    …"
    text = "\n".join(lines)
    assert "S1 is not backscatter in dB: from 400 to 400" in text and names_of(5)[2] in text
    assert f"{names_of(2)[0]}: a band of S2 is all zero" in text
    assert f"{S2_NAME}: is in split train and in split validation" in text
    assert "1 of 1 names are not in metadata.parquet: nowhere" in text


def test_check_names_a_header_of_impossible_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(write_v2(tmp_path), {S1_NAME: (2**63).to_bytes(8, "little") + bytes(100)})
    assert run("check", tmp_path) == 1
    assert f"{S1_NAME}: not safetensors: 108 bytes with a header of {2**63}" in capsys.readouterr().out


def test_check_finds_an_attack_without_executing_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pickles(tmp_path)
    put(tmp_path, {V1_NAME: pickled(bands_of(1), labels_of(1), extra=print)})
    assert run("check", tmp_path) == 1
    assert f"{V1_NAME}: the pickle refers to the foreign global 'builtins.print'" in capsys.readouterr().out


def test_check_compares_the_checksums_that_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_v2(tmp_path / "a")
    sums = tmp_path / "sums.json"
    assert run("check", tmp_path / "a", "--checksums", sums) == 0
    assert len(json.loads(sums.read_text())) == 30
    assert run("check", tmp_path / "a", "--checksums", sums) == 0
    file = next((tmp_path / "a").glob("*.lmdb/data.mdb"))
    content = bytearray(file.read_bytes())
    pixels = bands_of(4)["B03"].tobytes()
    content[content.find(pixels) + 5] ^= 1
    file.write_bytes(content)
    assert run("check", tmp_path / "a", "--checksums", sums) == 1
    assert f"{names_of(4)[0]}: its checksum changed" in capsys.readouterr().out


def test_an_empty_path_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stats", "") == 2
    assert capsys.readouterr().err == "data.path must name a folder, or be synthetic: found nothing\n"


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_an_invalid_checksum_file_is_rejected_before_the_archive_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    write_v2(tmp_path / "a")
    (tmp_path / "sums").write_bytes(content.encode("latin-1"))
    assert run("check", tmp_path / "a", "--checksums", tmp_path / "sums") == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path / 'sums'}: ")


def test_check_of_a_truncated_archive_has_status_1_and_of_a_missing_one_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_v2(tmp_path / "a")
    os.truncate(next((tmp_path / "a").glob("*.lmdb/data.mdb")), 9000)
    assert run("check", tmp_path / "a") == 1
    assert "is truncated" in capsys.readouterr().out
    assert run("check", tmp_path / "b") == 2
    assert f"there is no folder {tmp_path / 'b'}" in capsys.readouterr().err


def test_a_converted_archive_holds_the_same_pairs(tmp_path: Path) -> None:
    write_pickles(tmp_path / "v1")
    assert run("convert", tmp_path / "v1", tmp_path / "v2") == 0
    source, converted = open_folder(tmp_path / "v1"), open_folder(tmp_path / "v2")
    assert source.is_v1 and not converted.is_v1
    for name in ("train", "validation", "test"):
        ours, theirs = source.split(name), converted.split(name)
        assert ours.names == theirs.names and np.array_equal(ours.labels(), theirs.labels())
        pairs = zip(ours.read(range(len(ours))), theirs.read(range(len(ours))), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    bands_60m = converted.split("train").bands_60m(3)
    assert bands_60m.keys() == {"B01", "B09"}
    assert all(np.array_equal(band, bands_of(3)[name]) for name, band in bands_60m.items())
    assert contents(tmp_path) == {"v1", "v2"}


def test_convert_accepts_archives_without_60_m_bands_and_rejects_damaged_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = {name: band for name, band in bands_of(1).items() if name not in ("B01", "B09")}
    put(write_pickles(tmp_path / "v1"), {V1_NAME: pickled(without, labels_of(1))})
    assert run("convert", tmp_path / "v1", tmp_path / "v2") == 0
    assert open_folder(tmp_path / "v2").split("train").bands_60m(1) == {}
    put(tmp_path / "v1", {V1_NAME: pickled(bands_of(1) | {"B09": np.zeros((20, 21), np.uint16)}, labels_of(1))})
    assert run("convert", tmp_path / "v1", tmp_path / "v3") == 2
    assert f"{V1_NAME}: band B09 must have shape [20, 20]: found [20, 21]" in capsys.readouterr().err
    assert run("convert", tmp_path / "v1", tmp_path / "v3", "--on-error", "skip") == 0
    assert V1_NAME not in open_folder(tmp_path / "v3").split("train").names


def test_an_interrupted_conversion_resumes(tmp_path: Path) -> None:
    write_pickles(tmp_path / "v1")
    ended = run_limited(1_000_000, "convert", tmp_path / "v1", tmp_path / "v2")
    assert ended.returncode == 2 and f"{tmp_path / 'v2'}: cannot be written: " in ended.stderr, ended.stderr
    assert contents(tmp_path) == {"v1", ".v2.partial"}
    assert run("convert", tmp_path / "v1", tmp_path / "v2") == 0
    assert len(open_folder(tmp_path / "v2").split("train")) == 5
    assert contents(tmp_path) == {"v1", "v2"}


def test_convert_rejects_existing_targets_and_archives_of_v2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pickles(tmp_path / "v1")
    write_v2(tmp_path / "v2")
    assert run("convert", tmp_path / "v1", tmp_path / "v2") == 2
    assert "v2: already exists" in capsys.readouterr().err
    assert run("convert", tmp_path / "v2", tmp_path / "v3") == 2
    assert "is not a BigEarthNet v1 archive" in capsys.readouterr().err


def test_convert_names_or_skips_a_damaged_patch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pickles(tmp_path / "v1")
    put(tmp_path / "v1", {V1_NAME: b"damaged"})
    assert run("convert", tmp_path / "v1", tmp_path / "v2") == 2
    assert V1_NAME in capsys.readouterr().err
    assert run("convert", tmp_path / "v1", tmp_path / "v2", "--on-error", "skip") == 0
    assert "9 pairs of 10" in capsys.readouterr().out
    assert V1_NAME not in open_folder(tmp_path / "v2").split("train").names


def test_stats_cover_all_pixels_of_the_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_v2(tmp_path)
    assert run("stats", tmp_path, "--split", "validation") == 0
    found = yaml.safe_load(capsys.readouterr().out)["data"]
    for sensor, bands in (("s1", S1_BANDS), ("s2", S2_BANDS)):
        pixels = [np.stack([bands_of(number)[band] for number in (5, 6, 7)]).astype(float) for band in bands]
        assert found[f"{sensor}_mean"] == pytest.approx([band.mean() for band in pixels], rel=1e-5)
        assert found[f"{sensor}_std"] == pytest.approx([band.std() for band in pixels], rel=1e-5)


def test_show_draws_the_requested_pairs(tmp_path: Path) -> None:
    write_v2(tmp_path / "a")
    assert run("show", tmp_path / "a", "--count", 3, "--output", tmp_path / "sheet.png") == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 3 * 240
        assert len(sheet.getcolors(1 << 20) or []) > 1000


def test_skipped_pairs_are_not_in_the_statistics_and_are_drawn_as_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_v2(tmp_path)
    put(tmp_path, {S1_NAME: b"damaged"})
    assert run("stats", tmp_path, "--on-error", "skip") == 0
    found = yaml.safe_load(capsys.readouterr().out)["data"]
    intact = [0, 2, 3, 4]
    for sensor, bands in (("s1", S1_BANDS), ("s2", S2_BANDS)):
        pixels = [np.stack([bands_of(number)[band] for number in intact]).astype(float) for band in bands]
        assert found[f"{sensor}_mean"] == pytest.approx([band.mean() for band in pixels], rel=1e-5)
        assert found[f"{sensor}_std"] == pytest.approx([band.std() for band in pixels], rel=1e-5)
    assert run("show", tmp_path, "--on-error", "skip", "--output", tmp_path / "sheet.png") == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        second = sheet.crop((16 + 256, 16, 16 + 256 + 240, 16 + 120))
        assert second.getcolors() == [(240 * 120, (255, 255, 255))]


def test_show_names_an_unwritable_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_v2(tmp_path / "a")
    for place in ("none/sheet.png", "a"):
        assert run("show", tmp_path / "a", "--output", tmp_path / place) == 2
        assert f"{tmp_path / place}: cannot be written" in capsys.readouterr().err
    assert contents(tmp_path) == {"a"}


@pytest.mark.skipif(not BEN_14K.exists(), reason=f"no lists in {BEN_14K} (CSMAE_REAL_DATA)")
def test_ben_14k_is_derived_from_the_names_of_all_patches(tmp_path: Path) -> None:
    others = [names_of(number)[1] for number in range(50)] + ["S2B_MSIL2A_20170924T93020_69_24"]
    random = np.random.default_rng(0)
    for file in ("train.csv", "val.csv", "test.csv"):
        names = [*(BEN_14K / file).read_text().split(), *others]
        (tmp_path / file).write_bytes("".join(f"{name}\r\n" for name in random.permutation(names)).encode())
    assert run("splits", "ben-14k", tmp_path, tmp_path / "new") == 0
    for file in ("train.csv", "val.csv", "test.csv"):
        assert (tmp_path / "new" / file).read_text().split() == (BEN_14K / file).read_text().split()
