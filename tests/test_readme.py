"""The README says what the records and the code say."""

import re
import shutil
from pathlib import Path

import pytest

from refine_harness.errors import DataError
from refine_harness.leaderboard import check, fill_readme
from refine_harness.records import read_records

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def test_the_table_is_what_the_records_make(tmp_path):
    records = read_records(ROOT / "leaderboard" / "records")
    copy = Path(shutil.copy(README, tmp_path))
    fill_readme(copy, records, "leaderboard/records/")
    assert copy.read_text() == README.read_text()


def test_the_committed_page_is_what_the_records_make():
    assert check([ROOT / "leaderboard" / "records"], ROOT / "leaderboard" / "index.html")


def test_a_readme_without_marks_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(DataError, match="no <!-- results -->"):
        fill_readme(tmp_path / "README.md", [], "")


@pytest.mark.parametrize("name", ("README.md", "CONTRIBUTING.md", "kernels/README.md", "leaderboard/README.md"))
def test_relative_links_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
