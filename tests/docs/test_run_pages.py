"""The program that runs the documentation's commands: what it takes for a command, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.docs.run_pages import PageError, commands_of, is_complete, pages, read_pages, run_all

ROOT = Path(__file__).resolve().parents[2]


def page(*blocks: str) -> str:
    return "# Title\n\n" + "\n\n".join(blocks) + "\n"


def texts(text: str) -> list[str]:
    return [command.text for command in commands_of("page.md", text)]


def test_commands_are_taken_in_order_with_their_lines():
    found = commands_of("page.md", page("```bash\n# a comment\nmake run\n\nls runs  # look\n```", "```sh\ntrue\n```"))
    assert [(c.line, c.text) for c in found] == [(5, "make run"), (7, "ls runs  # look"), (11, "true")]


@pytest.mark.parametrize(
    "text", ["python a.py \\\n    --b", "for x in 1 2; do\n  echo $x\ndone", "cat <<'E'\nx\nE", 'echo "a\nb"']
)
def test_a_command_has_as_many_lines_as_bash_needs(text):
    assert texts(page(f"```bash\n{text}\ntrue\n```")) == [text, "true"]


def test_output_in_a_console_block_is_no_command():
    assert texts(page("```console\n$ ls \\\n  runs\nfirst\n$ true\n```")) == ["ls \\\n  runs", "true"]


def test_python_runs_here_only_if_it_needs_a_run():
    text = page(
        "```python\nx = 1\n```", "```python after-run\nprint('x')\n```", "```yaml\na: 1\n```", "```\na/  folder\n```"
    )
    assert texts(text) == ["python - <<'END_OF_BLOCK'\nprint('x')\nEND_OF_BLOCK"]


@pytest.mark.parametrize(
    ("shown", "runs"),
    [
        ("make run", 'make run ARGS="training.epochs=2"'),
        ('make run ARGS="model=mlp"  # four', 'make run ARGS="model=mlp training.epochs=2"  # four'),
        ("make run ARGS='training.epochs=9'", 'make run ARGS=" training.epochs=2"'),
        ("python launch/submit.py seed=1,2", "python launch/submit.py seed=1,2 training.epochs=2"),
        ("python launch/submit.py a='x # y'  # two", "python launch/submit.py a='x # y' training.epochs=2  # two"),
        ("pwm train training.epochs=9 model=mlp", "pwm train model=mlp training.epochs=2"),
        (
            "torchrun --nproc-per-node 2 launch/train.py",
            "torchrun --nproc-per-node 2 launch/train.py training.epochs=2",
        ),
    ],
)
def test_words_of_a_marker_go_to_what_trains_and_to_nothing_else(shown, runs):
    block = f"<!-- ci: training.epochs=2 -->\n```bash\n{shown}\nls\npython launch/submit.py --help\n```"
    found = commands_of("page.md", page(block))
    assert [c.text for c in found] == [runs, "ls", "python launch/submit.py --help"]
    assert found[0].shown == shown


def test_words_go_to_other_commands_where_nothing_trains():
    block = "<!-- ci: --episodes=2 -->\n```bash\npython launch/data.py generate --episodes 9 --out x\nls\n```"
    assert texts(page(block)) == ["python launch/data.py generate --out x --episodes=2", "ls"]


def test_a_block_that_the_reader_saves_is_written_to_its_file(tmp_path):
    block = "<!-- ci: file my_env.py -->\n```python\nx = '$HOME'\n```\n\n```bash\ngrep -q HOME my_env.py\n```"
    assert run_all(commands_of("page.md", page(block)), tmp_path, dict(os.environ)) == 0
    assert (tmp_path / "my_env.py").read_text(encoding="utf-8") == "x = '$HOME'\n"


def test_a_block_is_skipped_for_a_known_reason():
    (found,) = commands_of("page.md", page("<!-- ci: skip: needs a cluster -->\n\n```bash\nsqueue\n```"))
    assert found.skipped == "needs a cluster"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("<!-- ci: skip: takes long -->\n```bash\ntrue\n```", "takes long"),
        ("<!-- ci: skip -->\n```bash\ntrue\n```", "needs a cluster"),
        ("<!-- ci skip: needs a cluster -->\n```bash\ntrue\n```", "<!-- ci: WORDS -->"),
        ("<!-- ci: fast please -->\n```bash\nmake run\n```", "fast please"),
        ("<!-- ci: -->\n```bash\nmake run\n```", "KEY=VALUE"),
        ("<!-- ci: a=1 -->\n```bash\nls\n```", "a=1"),
        ("<!-- ci: a=1 -->\n```yaml\nb: 1\n```", "yaml"),
        ("<!-- ci: a=1 -->\n```python after-run\nb = 1\n```", "a=1"),
        ("<!-- ci: file x.sh -->\n```bash\ntrue\n```", "x.sh"),
        ("<!-- ci: file ../x -->\n```yaml\nb: 1\n```", "../x"),
        ("<!-- ci: a=1 -->\n<!-- ci: b=1 -->\n```bash\nmake run\n```", "two markers"),
        ("<!-- ci: a=1 -->\nText.", "does not stand before a block"),
        ("Text. <!-- ci: a=1 -->", "a line of its own"),
        ("```\npython launch/submit.py\n```", "```bash"),
        ("```shell\nmake run\n```", "shell"),
        ("```text\n$ pip install x\n```", "text"),
        ("```python no-run\nx = 1\n```", "no-run"),
        ("Text:\n\n    make run", "indented"),
        ("```bash\nif true; then\n```", "if true; then"),
        ("```bash\ntrue", "not closed"),
    ],
)
def test_what_means_nothing_is_an_error_with_its_line(text, names):
    with pytest.raises(PageError, match=r"page\.md:\d+: ") as error:
        commands_of("page.md", page(text))
    assert names in str(error.value)


def test_commands_share_one_shell_and_failures_are_counted(tmp_path, capsys):
    text = "```bash\nname=value\ncd sub\necho $name in $PWD; false\ncat\nnosuchcommand\ntest $name = value\n```"
    (tmp_path / "sub").mkdir()
    assert run_all(commands_of("page.md", page(text)), tmp_path, dict(os.environ)) == 2
    printed = capsys.readouterr().out
    assert f"value in {tmp_path}/sub" in printed
    assert "nosuchcommand: command not found" in printed
    assert "6 commands in" in printed
    assert "2 failed" in printed


def test_a_shell_that_ended_fails_what_comes_after_it(tmp_path):
    assert run_all(commands_of("page.md", page("```bash\nexit 0\ntrue\n```")), tmp_path, dict(os.environ)) == 2


def test_so_does_one_that_hung(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tests.docs.run_pages.LIMIT", 0.3)
    commands = commands_of("page.md", page("```bash\nsleep 60\ntrue\n```"))
    assert run_all(commands, tmp_path, dict(os.environ)) == 2
    printed = capsys.readouterr().out
    assert "still running after 0.3 s" in printed
    assert "the shell has ended" in printed


def test_an_open_here_document_is_not_complete():
    assert not is_complete("cat <<E\nx")
    assert is_complete("cat <<E\nx\nE")


def test_every_page_of_this_repository_can_be_read():
    assert {"README.md", "tutorial.md", "multitask.md", "cluster.md"} <= {each.name for each in pages(ROOT)}
    commands = read_pages(ROOT)
    assert commands[0].shown.startswith("make run")
    assert {c.page for c in commands} > {"README.md", "docs/tutorial.md"}
