"""Split lists as the published code and ConfigILM write and read them: CSV files with the patch in the first column."""

from pathlib import Path
from typing import Any

import pytest

from csmae.cli.main import main
from csmae.data.errors import ArchiveError
from csmae.data.subsets import in_ben_14k
from tests.support.archives import FILES, names_of, open_folder, write_pickles, write_v2

A, B, C = (names_of(number).v1 for number in (0, 1, 2))
"""Names of v1; archives of both versions accept them."""

CONTENTS = {
    "one column": f"{A}\n{B}\n{C}\n",
    "further columns": f"{A},S1A_1,train\n{B},S1A_2,train\n{C},S1A_3,train\n",
    "quotes": f'"{A}"\n"{B}"\n"{C}"\n',
    "quotes and further columns that hold commas": f'"{A}","Pastures, Arable land"\n"{B}",""\n"{C}","x ""y"""\n',
    "Windows line endings": f"{A},x\r\n{B},y\r\n\r\n{C},z\r\n",
    "a byte order mark": f'\ufeff"{A}",x\n{B},y\n{C},z',
    "a trailing comma": f"{A},\n{B},\n{C},\n",
    "spaces": f' {A} , x\n "{B}", y\n{C}\n',
    "a header": f"patch_id\n{A}\n{B}\n{C}\n",
    "a header of several columns": f"patch_id,labels,split\n{A},,train\n{B},,train\n{C},,train\n",
    "a header in quotes and capitals": f'"Patch Name","S1"\r\n"{A}","x"\r\n"{B}","y"\r\n"{C}","z"\r\n',
}


@pytest.mark.parametrize("write", [write_v2, write_pickles])
@pytest.mark.parametrize("kind", list(CONTENTS))
def test_the_first_column_of_a_list_is_read(tmp_path: Path, write: Any, kind: str) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "train.csv").write_bytes(CONTENTS[kind].encode())
    split = open_folder(write(tmp_path / "a"), splits_dir=str(lists)).split("train")
    version = 1 if write is write_pickles else 0
    assert split.names == [names_of(number)[version] for number in (0, 1, 2)]


def rejected(folder: Path, content: str) -> str:
    (folder / "lists").mkdir(exist_ok=True)
    (folder / "lists/train.csv").write_text(content)
    with pytest.raises(ArchiveError) as error:
        open_folder(folder, splits_dir=str(folder / "lists")).split("train")
    text = str(error.value)
    assert "\n" not in text and text.startswith(str(folder / "lists/train.csv")), text
    return text


def test_an_invalid_list_is_rejected_with_the_expected_format(tmp_path: Path) -> None:
    write_v2(tmp_path)
    assert "is not CSV: unexpected end of data" in rejected(tmp_path, f'"{A}\n{B}\n')
    assert "lists no patch" in rejected(tmp_path, "patch_id,split\n")
    assert "line 2 has no name in its first column" in rejected(tmp_path, f"{A},x\n,y\n")
    assert f"1 names are listed twice: {A}; keep one row for each" in rejected(
        tmp_path, f"{A},train\n{B},train\n{A},test\n"
    )


def test_a_list_that_names_a_patch_by_both_versions_is_rejected(tmp_path: Path) -> None:
    write_v2(tmp_path)
    text = rejected(tmp_path, f"{A}\n{B}\n{names_of(0).v2}\n")
    assert f"1 patches are listed twice: {names_of(0).v2}; keep one row for each" in text


def test_the_only_name_of_a_list_is_not_taken_for_a_header(tmp_path: Path) -> None:
    assert "1 of 1 names are not in metadata.parquet: patch_id" in rejected(write_v2(tmp_path), "patch_id\n")


def test_subsets_are_derived_from_lists_of_several_columns(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    for number, file in enumerate(FILES.values()):
        (tmp_path / "lists" / file).write_text(f'name,x\n"S2A_MSIL2A_20170803T094031_{number}_19","y"\nother_1,z\n')
    assert main(["data", "splits", "ben-14k", str(tmp_path / "lists"), str(tmp_path / "new")]) == 0
    assert (tmp_path / "new/val.csv").read_text() == "S2A_MSIL2A_20170803T094031_1_19\n"


@pytest.mark.parametrize(
    ("name", "belongs"),
    [
        ("S2A_MSIL2A_20170803T094031_N9999_R036_T34TCR_26_19", True),
        ("S2A_MSIL2A_20170803T094031_N9999_R036_T34TCP_26_19", False),
        ("S2A_MSIL2A_20170903T094031_N9999_R036_T34TCR_26_19", False),
        ("S2A_MSIL2A_20170803T094031_26_19", True),
        ("S2A_MSIL2A_20170613T101031_26_19", False),
    ],
)
def test_ben_14k_is_summer_in_five_tiles(name: str, belongs: bool) -> None:
    assert in_ben_14k(name) == belongs
