"""A bundle is the files that CORE reads: identified by content, checked before it is written."""

from __future__ import annotations

import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from slm.evaluate import bundle
from tests import bundles
from tests.commands import slm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return bundles.write(tmp_path / "eval_bundle")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def zipped(folder: Path, root: str = "eval_bundle/") -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as file:
        for member in sorted(folder.rglob("*")):
            file.write(member, root + str(member.relative_to(folder)))
    return path


def test_a_zip_a_folder_and_its_parent_are_one_bundle(folder: Path, home: Path) -> None:
    installed = bundle.install(folder, home)
    assert {
        bundle.install(source, home).id
        for source in (folder.parent, zipped(folder), zipped(folder, ""))
    } == {installed.id}
    assert installed.folder == home / "data" / "core" / installed.id
    assert bundle.installed(home) == installed
    assert [task.label for task in installed.tasks] == list(bundles.TASKS)
    assert all(len(installed.examples(task)) == 40 for task in installed.tasks)


def test_files_that_core_does_not_read_are_neither_copied_nor_hashed(
    folder: Path, home: Path
) -> None:
    first = bundle.install(folder, home)
    (folder / "eval_data" / "more.jsonl").write_text("anything")
    (folder / "README.md").write_text("anything")
    assert bundle.install(folder, home).id == first.id
    names = {path.name for path in first.folder.rglob("*") if path.is_file()}
    assert names == {
        "core.yaml",
        "eval_meta_data.csv",
        *(f"{label}.jsonl" for label in bundles.TASKS),
    }


def test_other_content_or_other_file_names_are_another_bundle(folder: Path, home: Path) -> None:
    first = bundle.install(folder, home)
    path = folder / "eval_data" / "counting" / "fits.jsonl"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    second = bundle.install(folder, home)
    path.rename(path.with_name("suits.jsonl"))
    index = folder / "core.yaml"
    index.write_text(index.read_text().replace("fits.jsonl", "suits.jsonl"))
    third = bundle.install(folder, home)
    assert len({first.id, second.id, third.id}) == 3
    with pytest.raises(ValueError, match=rf"3 bundles match 'core' in .*{second.id}.*--bundle"):
        bundle.installed(home)
    assert bundle.installed(home, second.id[:8]) == second


def test_a_changed_bundle_is_an_error(folder: Path, home: Path) -> None:
    installed = bundle.install(folder, home)
    path = installed.folder / "eval_data" / "counting" / "fits.jsonl"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ValueError, match="was changed"):
        bundle.installed(home)


def test_a_missing_bundle_names_the_command_that_gets_it(home: Path) -> None:
    with pytest.raises(ValueError, match="get it with `slm data core`"):
        bundle.installed(home)


def test_corrected_baselines_replace_the_three_that_dclm_corrected(
    reference: Path, home: Path
) -> None:
    installed = bundle.install(reference / "core" / "core_bundle.zip", home)
    published = json.loads((reference / "core" / "reference_scores.json").read_text())
    moved = {
        task.label: 100 * task.corrected
        for task in installed.tasks
        if task.corrected != task.baseline
    }
    assert moved == pytest.approx(published["fixed_dclm_baselines_percent"])
    assert (
        len(installed.tasks),
        sum(len(installed.examples(task)) for task in installed.tasks),
    ) == (22, 91037)


FITS = "eval_data/counting/fits.jsonl"


def index(folder: Path, old: str, new: str) -> None:
    path = folder / "core.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def line(folder: Path, number: int, text: str) -> None:
    lines = (folder / FITS).read_text().splitlines()
    lines[number - 1] = text
    (folder / FITS).write_text("\n".join(lines))


def link(folder: Path) -> None:
    (folder / FITS).rename(folder.parent / "outside.jsonl")
    (folder / FITS).symlink_to(folder.parent / "outside.jsonl")


GOOD = '{"context_options": ["a", "b"], "continuation": "c", "gold": 0}'


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "core.yaml").unlink(),
            "is not a bundle: there is no core.yaml in it",
        ),
        (lambda folder: (folder / "eval_meta_data.csv").unlink(), "has no .*eval_meta_data.csv"),
        (lambda folder: (folder / FITS).unlink(), f"has no .*{FITS}"),
        (
            lambda folder: (folder / "core.yaml").write_text("icl_tasks: ["),
            "core.yaml is not YAML: .*line 1",
        ),
        (
            lambda folder: (folder / "core.yaml").write_text("icl_tasks: 3"),
            "core.yaml has no list icl_tasks",
        ),
        (lambda folder: (folder / "core.yaml").write_text("icl_tasks: []"), "0 tasks"),
        (
            lambda folder: index(folder, '"schema"', '"riddle"'),
            "task 'fits' has type 'riddle', which is none of",
        ),
        (
            lambda folder: index(folder, '"num_fewshot": [1]', '"num_fewshot": 1'),
            "'fits' has num_fewshot 1, not a list",
        ),
        (
            lambda folder: index(folder, "counting/fits", "../fits"),
            "reads '../fits.jsonl', which is not a plain path",
        ),
        (
            lambda folder: index(folder, "counting/fits", "/fits"),
            "reads '/fits.jsonl', which is not a plain path",
        ),
        (
            lambda folder: index(folder, '"label": "fits"', '"label": "a/b"'),
            "'a/b' has a name of more than",
        ),
        (
            lambda folder: index(folder, '"label": "fits"', '"label": "new"'),
            "task 'new' has no baseline",
        ),
        (
            lambda folder: index(folder, '"label": "fits"', '"label": "goes_on"'),
            "4 tasks, 3 by name",
        ),
        (lambda folder: line(folder, 7, "{broken"), f"{FITS}, line 7: not JSON"),
        (lambda folder: line(folder, 7, "[]"), "line 7: not a JSON object"),
        (
            lambda folder: line(folder, 7, GOOD.replace('"c"', "4")),
            "line 7: 'continuation' is not a text",
        ),
        (
            lambda folder: line(folder, 7, GOOD.replace('"b"', "4")),
            "line 7: 'context_options' is not a list of texts",
        ),
        (
            lambda folder: line(folder, 7, GOOD.replace(": 0", ": 2")),
            "line 7: 'gold' is 2, not the index of one of its 2 choices",
        ),
        (
            lambda folder: line(folder, 7, GOOD.replace(": 0", ": true")),
            "line 7: 'gold' is True",
        ),
        (
            lambda folder: (folder / FITS).write_text(f"{GOOD}\n\n"),
            "has 1 examples: too few for the 1 shots of fits",
        ),
    ],
)
@pytest.mark.parametrize("pack", [zipped, lambda folder: folder], ids=["zip", "folder"])
def test_an_incomplete_bundle_is_a_one_line_error_and_nothing_is_written(
    folder: Path,
    home: Path,
    spoil: Callable[[Path], None],
    message: str,
    pack: Callable[[Path], Path],
) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=message) as error:
        bundle.install(pack(folder), home)
    assert "\n" not in str(error.value)
    assert not home.exists()


def test_a_link_out_of_the_bundle_is_an_error(folder: Path, home: Path) -> None:
    link(folder)
    with pytest.raises(ValueError, match="is a link out of the bundle"):
        bundle.install(folder, home)


def test_a_zip_is_read_by_name_and_its_links_are_errors(folder: Path, home: Path) -> None:
    path = zipped(folder)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("../outside", "anything")
    installed = bundle.install(path, home)
    assert not list(folder.parent.rglob("outside"))
    member = zipfile.ZipInfo(f"linked/{FITS}")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(folder.with_suffix(".link.zip"), "w") as file:
        for name in installed.folder.rglob("*"):
            if name.is_file() and name.name != "fits.jsonl":
                file.write(name, f"linked/{name.relative_to(installed.folder)}")
        file.writestr(member, "/etc/passwd")
    with pytest.raises(ValueError, match=r"fits\.jsonl is a link"):
        bundle.install(folder.with_suffix(".link.zip"), home)


def test_a_damaged_or_truncated_zip_is_an_error(folder: Path, home: Path) -> None:
    path = zipped(folder)
    content = path.read_bytes()
    for damaged in (b"", b"text", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a complete zip file"):
            bundle.install(path, home)
    start = content.index(b"choices")
    path.write_bytes(content[:start] + b"CHOICES" + content[start + 7 :])
    with pytest.raises(ValueError, match="is not a complete zip file: Bad CRC-32"):
        bundle.install(path, home)
    with pytest.raises(ValueError, match="neither a zip nor a folder"):
        bundle.install(folder / "nothing", home)
    assert not home.exists()


def test_a_file_above_the_size_limit_is_an_error(
    folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "MAX_FILE_BYTES", 1000)
    for source in (folder, zipped(folder)):
        with pytest.raises(ValueError, match="is larger than 1,000 bytes"):
            bundle.install(source, home)


def test_the_command_prints_the_installed_bundle(folder: Path, home: Path) -> None:
    result = slm("data", "core", "--from", str(folder), home=home)
    installed = bundle.installed(home)
    assert result.stdout == f"bundle {installed.id}: 4 tasks, 160 examples; {installed.folder}\n"
    (folder / "core.yaml").unlink()
    result = slm("data", "core", "--from", str(folder), home=home)
    assert (result.returncode, result.stderr) == (
        2,
        f"slm: {folder} is not a bundle: there is no core.yaml in it\n",
    )
