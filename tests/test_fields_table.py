import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encdiff.errors import InputError
from encdiff.fields import table
from encdiff.fields.grid import Grid
from encdiff.fields.sensors import Sensors
from encdiff.fields.table import read_sensors, write_sensors

GRID = Grid(("permeability", "pressure"), 8, 8)
ONE = Grid(("vorticity",), 8, 8)


@pytest.fixture
def read(tmp_path):
    """Write a text or bytes, read it."""

    def call(content, grid=GRID, **how):
        path = tmp_path / "sensors.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_sensors(path, grid, **how)

    return call


def same(a: Sensors, b: Sensors) -> None:
    measured = ~np.isnan(a.values)
    np.testing.assert_array_equal(a.points, b.points)
    np.testing.assert_array_equal(a.values, b.values)
    np.testing.assert_array_equal(a.sigma[measured], b.sigma[measured])
    np.testing.assert_array_equal(a.times, b.times)


def test_a_table(read, tmp_path):
    found = read("""# measured on a Friday

y,x,pressure,permeability,sigma,sigma_pressure,t
0.25,.5,-1e-3,12,0.1,0.01,0
# a comment in between
1,0,+2.5,,0.2,,1.5
0.25,0.5,,3,0,,3
""")
    np.testing.assert_array_equal(found.points, [[0.5, 0.25], [0, 1], [0.5, 0.25]])
    np.testing.assert_array_equal(found.values, [[12, -1e-3], [np.nan, 2.5], [3, np.nan]])
    np.testing.assert_array_equal(found.sigma, [[0.1, 0.01], [0.2, 0.2], [0, 0]])
    np.testing.assert_array_equal(found.times, [0, 1.5, 3])
    np.testing.assert_array_equal(found.lines, [4, 6, 7])
    assert found.source == str(tmp_path / "sensors.csv")


def test_a_part_of_the_channels_exact_and_at_one_time(read):
    found = read("x,y,pressure\n0.5,0.5,1\n")
    np.testing.assert_array_equal(found.values, [[np.nan, 1]])
    np.testing.assert_array_equal(found.sigma, 0)
    assert found.times is None


@pytest.mark.parametrize("name", ["value", "vorticity"])
def test_one_channel(read, name):
    found = read(f"x,y,{name},sigma\n0.5,0.5,1,0.5\n", ONE)
    np.testing.assert_array_equal([found.values, found.sigma], [[[1]], [[0.5]]])


@pytest.mark.parametrize(
    "content",
    [
        "x;y;pressure\n0.5;0.25;1\n",
        "x\ty\tpressure\n0.5\t0.25\t1",
        b"\xef\xbb\xbfx,y,pressure\r\n0.5,0.25,1\r\n",
        "\n\n x , y , pressure \r\r 0.5 , 0.25 , 1 \r  # the end",
        '"x","y","pressure"\n"0.5","0.25","1"\n',
    ],
    ids=["semicolons", "tabs", "byte order mark", "blanks", "quotes"],
)
def test_forms(read, content):
    found = read(content)
    np.testing.assert_array_equal(found.points, [[0.5, 0.25]])
    np.testing.assert_array_equal(found.values, [[np.nan, 1]])


def test_time(read):
    content = "x,y,pressure,t\n0.1,0.1,1,0\n0.1,0.1,2,1\n0.1,0.1,3,2\n"
    np.testing.assert_array_equal(read(content, time=1.0).values[:, 1], [1, 2])
    with pytest.raises(InputError, match=r"time is -1, before the first of .*sensors.csv at 0"):
        read(content, time=-1.0)


HEADER = "x,y,permeability,pressure"
KNOWN = "x, y, permeability, pressure, t, sigma, sigma_permeability, sigma_pressure"
EXAMPLE = f"such as {HEADER}"
OR_EMPTY = "must be a finite number, or empty where nothing is measured"


@pytest.mark.parametrize(
    "content, message",
    [
        ("", f"sensors.csv: is empty, must begin with a line of column names, {EXAMPLE}"),
        ("# nothing\n\n", f"sensors.csv: is empty, must begin with a line of column names, {EXAMPLE}"),
        (HEADER, "sensors.csv: holds no sensors, must hold at least one"),
        ("0,0,1,2\n", f"sensors.csv, line 1: is of numbers, must be the names of the columns, {EXAMPLE}"),
        ("x,y\n0,0\n", "line 1: has no channel, must have at least one of permeability, pressure"),
        ("x,pressure\n0,0\n", f"line 1: has no column y, must have x, y and a channel, {EXAMPLE}"),
        ("x,y,value\n0,0,1\n", f"line 1: has a column 'value', must have of {KNOWN}"),
        ("x,y,Pressure\n0,0,1\n", f"line 1: has a column 'Pressure', must have of {KNOWN}"),
        ("x y pressure\n0 0 1\n", f"line 1: has a column 'x y pressure', must have of {KNOWN}"),
        ("x,y,pressure,\n0,0,1,\n", f"line 1: has a column '', must have of {KNOWN}"),
        ("x,y,pressure,x\n0,0,1,0\n", "line 1: has two columns of x, must have one"),
        (f"{HEADER}\n0,0,1,2\n\n0,0,1\n", "line 4: has 3 cells, must have 4, as the header has"),
        (f"{HEADER}\n0,0,1,2,\n", "line 2: has 5 cells, must have 4, as the header has"),
        (f"{HEADER}\n0,0,1,nan\n", f"line 2: pressure is 'nan', {OR_EMPTY}"),
        (f"{HEADER}\n0,0,inf,1\n", f"line 2: permeability is 'inf', {OR_EMPTY}"),
        (f"{HEADER}\n0,0,1e999,1\n", f"line 2: permeability is '1e999', {OR_EMPTY}"),
        (f"{HEADER}\n0,0,1_0,1\n", f"line 2: permeability is '1_0', {OR_EMPTY}"),
        ("x;y;pressure\n0;0;0,5\n", f"line 2: pressure is '0,5', {OR_EMPTY}"),
        (f"{HEADER}\n0,there,1,1\n", "line 2: y is 'there', must be a finite number"),
        (f"{HEADER}\n,0,1,1\n", "line 2: x is '', must be a finite number"),
        (f"{HEADER},t\n0,0,1,1,\n", "line 2: t is '', must be a finite number"),
        (f"{HEADER}\n0,0,,\n", "line 2: has no value, must have one of at least one channel"),
        (f"{HEADER},sigma\n0,0,1,1,\n", "line 2: sigma of permeability is empty, must be a number; 0 if exact"),
        (f"{HEADER},sigma_pressure\n0,0,1,1,\n", "line 2: sigma of pressure is empty, must be a number; 0 if exact"),
        (f"{HEADER},sigma\n0,0,1,1,0\n0,0,1,1,-1\n", "line 3: sigma is -1, must be 0 or more, at most 1e\\+30"),
        (f"{HEADER}\n0,0,1e31,1\n", r"line 2: value is 1e\+31, must lie in -1e\+30 to 1e\+30"),
        (f"# m\n{HEADER}\n0,0,1,1\n130,0,1,1\n", "line 4: x is 130, must lie in 0 to 1; are the units those of the"),
        (
            f"{HEADER}\n0.5,0.5,1,1\n0.5,0.5,1,2\n",
            r"line 3: value is 2.0, on line 2 at the same place and time 1.0; both cannot be exact \(sigma 0\)",
        ),
        (f'{HEADER}\n0,0,"1,1\n', r"line 2: is no line of a CSV file \(unexpected end of data\)"),
        ("x,y,pressure\n0,0,1\n".encode("utf-16"), "is not text in UTF-8 .*, must be a CSV file"),
        (b"\x89HDF\r\n\x1a\n", "is not text in UTF-8 .*, must be a CSV file"),
        (f"{HEADER}\n0,0,{'1' * 131_072}x,1\n", "line 2: is no line of a CSV file"),
        (f"{HEADER}\n0,0,{'1' * 131_000}x,1\n", r"line 2: permeability is '1{80}', must be"),
    ],
)
def test_bad_tables(read, content, message):
    with pytest.raises(InputError, match=message) as error:
        read(content)
    assert "\n" not in str(error.value) and "sensors.csv" in str(error.value)


def test_a_file_too_large_is_not_read(read, monkeypatch):
    monkeypatch.setattr(table, "BYTES", 100)
    with pytest.raises(InputError, match=r"sensors.csv: holds more than 100 bytes; is it another file\?"):
        read(f"{HEADER}\n" + 100 * "0,0,1,1\n")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_sensors(tmp_path / "none.csv", GRID)


numbers = st.floats(-1e30, 1e30)


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 1),
            st.floats(0, 1),
            numbers,
            numbers | st.just(np.nan),
            st.floats(1e-300, 1e30),
            numbers,
        ),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
)
def test_round_trip(tmp_path_factory, rows, timed):
    rows = np.array(rows)
    sensors = Sensors.of(rows[:, :2], rows[:, 2:4], rows[:, 4:5], rows[:, 5] if timed else None)
    path = tmp_path_factory.getbasetemp() / "round.csv"
    write_sensors(path, sensors, GRID)
    same(read_sensors(path, GRID), sensors)


def test_what_is_written(tmp_path):
    write_sensors(tmp_path / "a.csv", Sensors.of([[0.1, 0.2], [1, 0]], [[np.nan, 1e-20], [np.nan, 3]]), GRID)
    assert (tmp_path / "a.csv").read_text() == "x,y,pressure\n0.1,0.2,1e-20\n1.0,0.0,3.0\n"
    named = Grid(('a "b", c',), 2, 2)
    sensors = Sensors.of([[0.5, 0.5]], [1.0], 0.5, 2.0)
    write_sensors(tmp_path / "b.csv", sensors, named)
    same(read_sensors(tmp_path / "b.csv", named), sensors)


def test_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("before")
    with pytest.raises(InputError, match="x is 2, must lie in"):
        write_sensors(path, Sensors.of([[2, 0]], [[1, 1]]), GRID)
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.parametrize("names", [("t",), ("sigma",), ("a", "sigma_a"), (" a",), ("a\nb",)])
def test_channels_that_a_table_cannot_name(tmp_path, names):
    grid = Grid(names, 2, 2)
    sensors = Sensors.of([[0.5, 0.5]], [[1.0] * len(names)])
    with pytest.raises(InputError, match="must have names other than x, y, t, sigma"):
        write_sensors(tmp_path / "a.csv", sensors, grid)
    (tmp_path / "b.csv").write_text("x,y,a\n0,0,1\n")
    with pytest.raises(InputError, match="must have names other than x, y, t, sigma"):
        read_sensors(tmp_path / "b.csv", grid)
