"""Names say which camera and when; views come together by time, never by position."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvcodec import container
from mvcodec.errors import UsageError
from mvcodec.frames import PICTURE_SUFFIXES, Instant, ViewName, find, find_scenes, instants, name_of, safe_path


@pytest.mark.parametrize(
    ("path", "camera", "frame"),
    [
        ("C1/00000000.png", "C1", 0),
        ("/data/WildTrack/Image_subsets/C7/00001995.png", "C7", 1995),
        ("cam3_00000012.png", "cam3", 12),
        ("x/Camera_02-0007.jpg", "Camera_02", 7),
        ("left/0003.png", "left", 3),
        ("right_0003.png", "right", 3),
        ("image_2/000010.png", "image_2", 10),
        ("stereo/L/0003.png", "L", 3),
        # One still scene: the number belongs to the name, not to a clock.
        ("DSC_0423.jpg", "DSC_0423", None),
        ("images/0001.jpg", "0001", None),
        ("images_4/0001.jpg", "0001", None),
        ("nineveh/00_IMG_20181115_133137.webp", "00_IMG_20181115_133137", None),
        ("mobilebrick/02_000004.webp", "02_000004", None),
        ("kitchen/left.png", "left", None),
        ("nerf/train/r_0.png", "r_0", None),
        ("décor/caméra.png", "caméra", None),
    ],
)
def test_camera_and_frame_from_the_name(path: str, camera: str, frame: int | None) -> None:
    assert name_of(Path(path)) == ViewName(camera, frame)


@given(
    name=st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=200)
    | st.sampled_from([".", "広場" * 40, os.fsdecode(b"caf\xe9")])
)
def test_every_name_gives_an_id_that_a_file_can_hold(name: str) -> None:
    camera = name_of(Path("photos", f"{name}.png")).camera_id
    header = container.Header(bytes(8), "tiny", 50.0, 1, 1, camera_id=camera)
    assert header.camera_id == camera
    assert camera != name_of(Path("photos", f"{name}.{name}.png")).camera_id


def test_a_number_that_no_file_can_hold_is_no_frame() -> None:
    assert name_of(Path(f"C1/{2**63 - 1}.png")) == ViewName("C1", 2**63 - 1)
    assert name_of(Path(f"C1/{2**63}.png")) == ViewName(str(2**63))
    assert name_of(Path(f"cam1_{2**63}.png")) == ViewName(f"cam1_{2**63}")


def test_other_trees_are_described_by_a_pattern() -> None:
    assert name_of(Path("a/take7_0012_north.png"), "take7_{frame}_{camera}") == ViewName("north", 12)
    assert name_of(Path("a/north/data/12.png"), "{camera}/data/{frame}") == ViewName("north", 12)
    assert name_of(Path("n-1700000000.png"), "{camera}-{time_us}") == ViewName("n", None, 1700000000)
    with pytest.raises(UsageError, match="does not fit"):
        name_of(Path("north.png"), "{camera}/{frame}")
    for wrong in ("{cam}", "frames", "{frame}{frame}"):
        with pytest.raises(UsageError, match="at most once"):
            name_of(Path("a.png"), wrong)


def test_views_meet_by_frame_though_cameras_drop_frames() -> None:
    views = [("C1", 0), ("C1", 2), ("C2", 2), ("C2", 1), ("C1", 1), ("C3", 2)]
    groups = instants(views, lambda v: Instant(v[1], None))
    assert groups == [
        (Instant(0, None), [("C1", 0)]),
        (Instant(1, None), [("C2", 1), ("C1", 1)]),
        (Instant(2, None), [("C1", 2), ("C2", 2), ("C3", 2)]),
    ]


def test_free_running_clocks_meet_within_the_window() -> None:
    times = [1_000_000, 1_040_000, 1_000_700, 1_039_100]
    assert [len(views) for _, views in instants(times, lambda t: Instant(None, t))] == [1, 1, 1, 1]
    groups = instants(times, lambda t: Instant(None, t), window_us=2_000)
    assert [views for _, views in groups] == [[1_000_000, 1_000_700], [1_039_100, 1_040_000]]


def test_views_without_any_time_are_still_scenes_by_place() -> None:
    assert instants("abc", lambda _: Instant()) == [(Instant(), ["a", "b", "c"])]
    views = [("door", 1), ("desk", 1), ("door", 2)]
    assert instants(views, lambda v: Instant(place=v[0])) == [
        (Instant(place="desk"), [("desk", 1)]),
        (Instant(place="door"), [("door", 1), ("door", 2)]),
    ]


def test_an_instant_has_a_name_for_messages() -> None:
    instants_named = [Instant(), Instant(place="door"), Instant(3, 5, "door"), Instant(None, 5)]
    assert list(map(str, instants_named)) == ["the scene", "scene door", "frame 3 in door", "time 5 us"]


_KEY = st.builds(Instant, st.none() | st.integers(0, 3), st.none() | st.integers(0, 50), st.sampled_from(["a", "b"]))


@given(keys=st.lists(_KEY), window=st.integers(0, 60))
def test_grouping_loses_nothing_and_depends_on_no_order(keys: list[Instant], window: int) -> None:
    groups = instants(keys, lambda key: key, window)
    assert sorted(map(str, keys)) == sorted(str(view) for _, views in groups for view in views)
    backwards = instants(keys[::-1], lambda key: key, window)
    assert [(when, sorted(map(repr, views))) for when, views in groups] == [
        (when, sorted(map(repr, views))) for when, views in backwards
    ]


def test_files_and_folders_are_found_with_the_path_that_output_mirrors(tmp_path: Path) -> None:
    places = tmp_path / "C1", tmp_path / "C2"
    for name in ("C1/0.png", "C2/0.PNG", "C2/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for inputs in [tmp_path], places:
        assert [(s.relative.as_posix(), s.place) for s in find(inputs, PICTURE_SUFFIXES)] == [
            ("C1/0.png", str(places[0])),
            ("C2/0.PNG", str(places[1])),
        ]
    assert [s.relative.as_posix() for s in find([places[0]], PICTURE_SUFFIXES)] == ["0.png"]
    files = find([tmp_path / "C2/0.PNG", tmp_path / "C1/0.png", tmp_path / "C2/0.PNG"], PICTURE_SUFFIXES)
    assert [(s.relative.as_posix(), s.place) for s in files] == [("C2/0.PNG", ""), ("C1/0.png", "")]
    assert [s.relative.as_posix() for s in find([tmp_path / "C2/notes.txt"], PICTURE_SUFFIXES)] == ["notes.txt"]
    with pytest.raises(UsageError, match="no such file"):
        find([tmp_path / "C3"], PICTURE_SUFFIXES)
    with pytest.raises(UsageError, match=r"holds no \.phv"):
        find([tmp_path], [".phv"])


@given(camera=st.text(max_size=150), frame=st.none() | st.integers(0, 2**32 - 1))
def test_a_received_camera_id_never_leaves_the_output_folder(camera: str, frame: int | None) -> None:
    path = PurePosixPath(safe_path(camera, frame, None).as_posix())
    assert not path.is_absolute()
    assert ".." not in path.parts
    assert len(path.parts) == (1 if frame is None else 2)


def test_views_without_file_name_are_named_by_camera_and_time() -> None:
    assert safe_path("C1", 7, None) == Path("C1/00000007")
    assert safe_path("C1", None, None) == Path("C1")
    assert safe_path("", None, 123) == Path("view/123")


def test_views_of_one_instant_of_a_rig_are_a_scene(tmp_path: Path) -> None:
    names = ("day1/C1/0000.png", "day1/C1/0001.png", "day1/C2/0001.png", "day2/C1/0001.png")
    names += ("flat/cam1_7.png", "flat/cam2_7.png", "still/DSC_0423.png", "still/DSC_0424.png")
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = {
        scene: [str(file.relative_to(tmp_path)) for file in files] for scene, files in find_scenes(tmp_path).items()
    }
    assert found == {
        "day1/0": ["day1/C1/0000.png"],
        "day1/1": ["day1/C1/0001.png", "day1/C2/0001.png"],
        "day2/1": ["day2/C1/0001.png"],
        "flat/7": ["flat/cam1_7.png", "flat/cam2_7.png"],
        "still": ["still/DSC_0423.png", "still/DSC_0424.png"],
    }
    assert find_scenes(tmp_path / "day1/C1").keys() == {"0", "1"}  # a camera's own folder: no two frames are one scene


def test_a_folder_without_pictures_has_no_scenes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no pictures"):
        find_scenes(tmp_path)


def test_scenes_are_of_files_linked_ones_included_and_not_of_results(tmp_path: Path) -> None:
    for name in ("data/a/1.png", "data/report/plot.png", "elsewhere/2.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    data = tmp_path / "data"
    (data / "a" / "folder.png").mkdir()
    (data / "a" / "lost.png").symlink_to("absent.png")
    (data / "b").symlink_to(tmp_path / "elsewhere")
    (data / "c").symlink_to("..")
    (data / "a" / "._1.png").touch()  # of macOS
    # whoever reads single files tells what leads nowhere; scenes are of what is there
    found = [source.path for source in find([data], PICTURE_SUFFIXES)][:3]
    assert found == [data / "a/1.png", data / "a/lost.png", data / "b/2.png"]
    assert find_scenes(data, data / "report") == {"a": [data / "a/1.png"], "b": [data / "b/2.png"]}
    assert find_scenes(data, tmp_path).keys() == {"a", "b", "report"}  # a folder around the data hides nothing
    with pytest.raises(UsageError, match="is the folder of the pictures"):
        find_scenes(data, data / "a/..")


def test_a_file_has_one_place_in_whatever_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output mirrors what is found: a `..` in an input would lead out of it."""
    (tmp_path / "work/C2").mkdir(parents=True)
    (tmp_path / "C1").mkdir()
    for name in ("C1/0.png", "work/C2/0.png"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "work")
    assert [s.relative.as_posix() for s in find(["../C1", "C2"], PICTURE_SUFFIXES)] == ["C1/0.png", "work/C2/0.png"]
    assert [s.relative.as_posix() for s in find(["C2/0.png", "../work/C2/0.png"], PICTURE_SUFFIXES)] == ["0.png"]
    for inputs in (["C2", "C2/0.png"], ["../work/C2/0.png", "C2"]):
        assert [(s.relative.as_posix(), s.place) for s in find(inputs, PICTURE_SUFFIXES)] == [("C2/0.png", "C2")]
    monkeypatch.chdir(tmp_path / "C1")
    assert name_of(Path("0.png")) == ViewName("C1", 0)


def test_a_folder_that_may_not_be_read_is_found_for_whoever_reads_it_to_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for camera in ("C1", "C2"):
        (tmp_path / camera).mkdir()
        (tmp_path / camera / "0.png").touch()
    listed = os.scandir

    def scandir(path: str) -> object:
        if Path(path).name == "C1":
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert [source.relative for source in find([tmp_path], {".png"})] == [Path("C1"), Path("C2/0.png")]


def test_an_empty_name_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="empty"):
        find([tmp_path, ""], {".png"})
