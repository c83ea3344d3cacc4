import ncu
import pytest

# As ncu prints it: chatter, the program's own lines, a head, units, and a row a kernel.
NAMES = ",".join(f'"{metric}"' for metric in ncu.METRICS.values())
PRINTED = f"""==PROF== Connected to process 41 (/usr/bin/python3.12)
a line, "of the program"
==PROF== Profiling "_products_kernel" - 0: 0%....50%....100% - 4 passes
"ID","Process ID","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",{NAMES}
"","","","","","","","","","us","Mbyte","Kbyte","Gbyte","inst","%","%","%","%"
"0","41","spin_kernel","1","7","(1, 1, 1)","(1, 1, 1)","0","9.0","1.50","0.002048","0","0","9","1","2","0","0"
"1","41","_products_kernel","1","7","(128, 1, 1)","(1,568, 4, 1)","0","9.0","1,234.56","402.748928","10.5","1.25","105,410,794","51.2","35.13","0","62.5"
==PROF== Disconnected from process 41
"""  # noqa: E501


def test_a_table_has_numbers_in_microseconds_bytes_and_shares():
    spin, products = ncu.read(PRINTED)
    assert spin["name"] == "spin_kernel"
    assert spin["read_bytes"] == pytest.approx(2048)
    assert products == {
        "name": "_products_kernel",
        "us": pytest.approx(1234.56),
        "read_bytes": pytest.approx(402_748_928),
        "written_bytes": pytest.approx(10_500),
        "l2_bytes": pytest.approx(1.25e9),
        "instructions": 105_410_794,
        "occupancy": pytest.approx(0.512),
        "issue": pytest.approx(0.3513),
        "tensor_pipe": 0,
        "fma_pipe": pytest.approx(0.625),
    }


def test_without_a_table_there_are_no_kernels():
    assert ncu.read("==WARNING== No kernels were profiled.\n") == []


def test_a_metric_that_is_missing_is_named():
    with pytest.raises(KeyError, match=r"lts__t_bytes\.sum"):
        ncu.read(PRINTED.replace("lts__t_bytes.sum", "lts__t_sectors.sum"))


@pytest.mark.parametrize(
    ("text", "unit", "expected"),
    [
        ("2,000", "ns", 2), ("2000", "nsecond", 2), ("1.5", "usecond", 1.5), ("3", "ms", 3000),
        ("2", "second", 2e6), ("7", "byte", 7), ("1.5", "Kbyte", 1500), ("4", "Tbyte", 4e12),
        ("12,345", "inst", 12345), ("25", "%", 0.25),
    ],
)  # fmt: skip
def test_units_are_converted(text, unit, expected):
    assert ncu.number(text, unit) == pytest.approx(expected)


@pytest.mark.parametrize(("text", "unit"), [("1", "cycle"), ("1", ""), ("n/a", "byte")])
def test_an_unknown_unit_or_no_number_is_an_error(text, unit):
    with pytest.raises(ValueError, match=repr(text if text == "n/a" else unit)):
        ncu.number(text, unit)


def test_without_ncu_there_is_one_clear_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="ncu: not found on the PATH"):
        ncu.find()


@pytest.fixture
def install(monkeypatch, tmp_path):
    """install(text, code): an ncu that writes the text, and its arguments into a file."""

    def write(text, code=0):
        (tmp_path / "text").write_text(text)
        script = tmp_path / "ncu"
        script.write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$@" > "{tmp_path}/arguments"\n'
            'while [ "$1" != --log-file ]; do shift; done\n'
            f'cat "{tmp_path}/text" > "$2"\nexit {code}\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return write


def test_it_profiles_what_a_command_asks_for(install, tmp_path):
    install(PRINTED)
    assert ncu.profile(ncu.find(), ["python", "x.py"], tmp_path / "log.csv") == PRINTED
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[-2:] == ["python", "x.py"]
    assert arguments[arguments.index("--profile-from-start") + 1] == "off"
    assert arguments[arguments.index("--clock-control") + 1] == "none"
    assert "dram__bytes_read.sum,dram__bytes_write.sum" in arguments[-3]


@pytest.mark.parametrize("code", [0, 1])
def test_counters_that_may_not_be_read_are_one_clear_error(install, tmp_path, code):
    refusal = "ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Counters"
    install(f"==PROF== Connected to process 41\n==ERROR== {refusal}\n", code)
    with pytest.raises(SystemExit, match=f"ncu: {refusal}"):
        ncu.profile(ncu.find(), ["python"], tmp_path / "log.csv")


def test_an_ncu_that_says_nothing_and_fails_is_an_error(install, tmp_path):
    (tmp_path / "log.csv").write_text("==ERROR== of a run before\n")
    install("", 3)
    (tmp_path / "ncu").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(SystemExit, match="exit code 3"):
        ncu.profile(ncu.find(), ["python"], tmp_path / "log.csv")
