import pytest
from ml_collections import ConfigDict, config_dict

from libs import config as config_files
from libs.errors import UserError


@pytest.fixture
def config() -> ConfigDict:
    sampler = {"name": "ddim", "steps": 50, "eta": 0.0, "grid": "uniform"}
    return ConfigDict(
        {
            "sampler": sampler,
            "keys": "0,1,2",
            "amp": False,
            "widths": (1, 2),
            "betas": (0.9, 0.99),
            "blocks": ("Down", "Up"),
            "nothing": (),
            "table": {"shape": ((1, 2), (3, 4))},
            "limit": config_dict.placeholder(int),
            "names": config_dict.placeholder(tuple),
            "note": None,
        }
    ).lock()


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("sampler.steps", "20", 20),
        ("sampler.steps", "-1", -1),
        ("sampler.eta", "1", 1.0),
        ("sampler.eta", "1e-3", 0.001),
        ("sampler.name", "", ""),
        ("keys", "0,1,2,5", "0,1,2,5"),
        ("keys", "(1, 2)", "(1, 2)"),
        ("keys", "none", "none"),
        ("amp", "true", True),
        ("amp", "False", False),
        ("widths", "(1, 2, 4)", (1, 2, 4)),
        ("widths", "8", (8,)),
        ("widths", "[]", ()),
        ("betas", "0,0.5", (0.0, 0.5)),
        ("blocks", "Down,'Attn'", ("Down", "Attn")),
        ("nothing", "1,0.5", (1, 0.5)),
        ("nothing", "fid,'kid'", ("fid", "kid")),
        ("limit", "7", 7),
        ("limit", "none", None),
        ("names", "1,2", (1, 2)),
        ("note", "any = text", "any = text"),
        ("note", "None", None),
    ],
)
def test_override(config, path, text, value):
    config_files.override(config, path, text)
    found = config_files.fields(config)[path]
    assert found == value
    assert type(found) is type(value)
    if isinstance(value, tuple):
        assert list(map(type, found)) == list(map(type, value))


@pytest.mark.parametrize(
    ("path", "text", "problem"),
    [
        ("sampler.stepz", "50", "no such field in config.sampler; choose from eta, grid, name, steps"),
        ("smapler.steps", "50", "no such field in config; choose from amp, betas, blocks, keys, limit, "),
        ("sampler.steps.x", "1", "no such field in config.sampler; choose from eta, grid, name, steps"),
        ("sampler.", "1", "no such field in config.sampler; choose from"),
        ("sampler", "ddim", "config.sampler is a section; choose a field: eta, grid, name, steps"),
        ("sampler.steps", "abc", "want an int"),
        ("sampler.steps", "2.0", "want an int"),
        ("sampler.steps", "none", "want an int"),
        ("sampler.steps", "", "want an int"),
        ("sampler.eta", "half", "want a float"),
        ("sampler.eta", "nan", "want a float"),
        ("amp", "1", "want true or false"),
        ("widths", "1,2.5", "want an int in every place of the tuple, such as 1,2 or (1,2)"),
        ("betas", "a", "want a float in every place of the tuple"),
        ("limit", "x", "want an int"),
        ("table.shape", "1,2", "a tuple of other than ints, floats or strings cannot be set"),
    ],
)
def test_bad_override(config, path, text, problem):
    before = config_files.fields(config)
    with pytest.raises(UserError) as caught:
        config_files.override(config, path, text)
    assert str(caught.value).startswith(f"--config.{path}={text}: {problem}")
    assert "\n" not in str(caught.value)
    assert config_files.fields(config) == before


FILE = """
from ml_collections import ConfigDict
def get_config(methods="none"):
    return ConfigDict({"methods": methods, "sampler": {"steps": 50}})
"""


def test_load(tmp_path, monkeypatch):
    (tmp_path / "x.py").write_text(FILE)
    assert config_files.load(f"{tmp_path}/x.py").methods == "none"
    assert config_files.load(f"{tmp_path}/x.py:").methods == "none"
    config = config_files.load(f"{tmp_path}/x.py:a,b")
    assert config.methods == "a,b"
    with pytest.raises(AttributeError):
        config.sampler.stepz = 3  # locked, sections too

    (tmp_path / "x.py").write_text(FILE.replace("50", "20"))  # same length and second: no stale byte code
    assert config_files.load(f"{tmp_path}/x.py").sampler.steps == 20


def test_relative_paths_are_of_the_working_directory_then_of_the_repository(tmp_path, monkeypatch):
    here, repository = tmp_path / "here", tmp_path / "repository"
    for folder, name in ((here, "here"), (repository, "repository")):
        (folder / "configs").mkdir(parents=True)
        (folder / "configs/both.py").write_text(FILE.replace("none", name))
    (repository / "configs/one.py").write_text(FILE)
    (repository / "configs/common.py").write_text("def no_config(): pass")
    monkeypatch.chdir(here)
    monkeypatch.setattr(config_files, "ROOT", repository)
    assert config_files.load("configs/both.py").methods == "here"
    assert config_files.load("configs/one.py").methods == "none"
    with pytest.raises(UserError) as caught:
        config_files.load("configs/two.py")
    text = "--config=configs/two.py: no such file; choose from configs/both.py, configs/one.py"
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("source", "methods", "problem"),
    [
        ("x = 1", "", "the file defines no get_config()"),
        ("get_config = 3", "", "the file defines no get_config()"),
        ("x = 1\n1 / 0", "", "ZeroDivisionError in line 2: division by zero"),
        ("import nosuchmodule", "", "ModuleNotFoundError in line 1: No module named 'nosuchmodule'"),
        ("x = 1\ndef get_config(:", "", "SyntaxError in line 2: "),
        ("def get_config():\n    raise KeyError('a\\nb')", "", "KeyError in line 2: "),
        ("import json\ndef get_config():\n    return json.loads('{')", "", "JSONDecodeError in line 3: "),
        ("def get_config(): return {}", "", "get_config() returns dict, not a ConfigDict"),
        ("def get_config(): return {}", ":clockwork", "{path} takes no methods after the colon"),
        ("def get_config():\n  import libs.errors as e\n  raise e.UserError('--x=1: bad')", "", "--x=1: bad"),
    ],
)
def test_bad_file(tmp_path, source, methods, problem):
    path = tmp_path / "x.py"
    path.write_text(source)
    with pytest.raises(UserError) as caught:
        config_files.load(f"{path}{methods}")
    text = str(caught.value)
    assert problem.format(path=path) in text
    assert text.startswith(f"--config={path}" if "--x" not in problem else problem)
    assert "\n" not in text


@pytest.mark.parametrize(("methods", "chosen"), [
    ("", set()), ("text", set()), ("text,dpm_solver", {"sampler.name", "sampler.order"}),
    ("dpm_solver,text", {"sampler.name", "sampler.order"})])
def test_what_methods_choose_is_not_what_the_model_is(methods, chosen):
    """`text` makes another model, guided by default; students of it need no guidance."""
    assert config_files.method_fields(f"configs/emoji32_uvit.py:{methods}") == chosen
