"""Networks of the catalog and of users' files."""

from pathlib import Path

import pytest

from dovetail.catalog.fabrics import fabric_names, load_fabric


def test_names_are_those_inside_the_files() -> None:
    for name in fabric_names():
        spec = load_fabric(name)
        assert spec.name == name and spec.source


def test_a_file_is_like_another_but_for_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('like = "mpft"\nname = "mine"\nsource = "ours"\nplanes = 4\nendpoints = 64\n')
    spec = load_fabric(path)
    assert (spec.planes, spec.endpoints, spec.radix, spec.nic) == (4, 64, 64, load_fabric("mpft").nic)
    assert load_fabric(path, endpoints=128).endpoints == 128


def test_another_kind_leaves_the_keys_of_the_first_behind(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('like = "ft3"\nname = "mine"\nsource = "ours"\nkind = "dragonfly"\nendpoints = 4096\n')
    assert load_fabric(path).kind == "dragonfly"


def test_mistakes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    with pytest.raises(ValueError, match="no fabric 'mptf'.*did you mean mpft"):
        load_fabric("mptf")
    with pytest.raises(ValueError, match="no fabric 'xyz'"):
        load_fabric("xyz")
    path.write_text('like = "mpftt"\n')
    with pytest.raises(ValueError, match="mine.toml: like = 'mpftt' is no fabric"):
        load_fabric(path)
    path.write_text('like = "mpft"\nplane = 4\n')
    with pytest.raises(ValueError, match="unknown key 'plane'; did you mean plane"):
        load_fabric(path)
    with pytest.raises(ValueError, match="no such file"):
        load_fabric(tmp_path / "absent.toml")
    with pytest.raises(ValueError, match="use 2048 or 2056"):
        load_fabric("mpft", endpoints=2049)
