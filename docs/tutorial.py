"""Records docs/tutorial.md: a session of the terminal UI in tmux on the built-in model, from nothing to an undo.

`python docs/tutorial.py` with editctl and tmux at hand. Every step waits for what the page says will be seen, so a page
that was written is one that can be followed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WIDTH, HEIGHT = 120, 32
PATIENCE = 180
"""Seconds for what a step leads to; the first run measures which directions the model's knowledge uses."""
LEFT = r"^\$$"
"""What stands there when the UI is left."""
PAGE = Path(__file__).with_name("tutorial.md")

Step = tuple[str, list[str], str]
"""What the page says, the keys (text that is typed in parentheses), and a pattern of what is then on the screen."""

STEPS: list[Step] = [
    (
        "# A first session\n\n"
        "This page is a recording: `python docs/tutorial.py` plays it in tmux on the built-in model and writes down "
        "what the screen shows. Follow it in an empty folder; it takes about two minutes.\n\n"
        "    mkdir facts\n    cd facts\n    editctl\n\n"
        "The line at the top has the seven places, `1` to `7`. The line at the bottom has the keys of the place; a dim "
        "key cannot be used now and says why when it is pressed. `?` explains all of them, `ctrl+p` finds them by "
        "name, `esc` leaves whatever is open.",
        [],
        "No edits yet",
    ),
    (
        "## 1. Write down a fact\n\n"
        "`n` opens a form, at the subject; `tab` goes to the next field. The subject is *the Eiffel Tower*, the "
        "relation is a prompt with `{}` where the subject stands, and the target is how the model shall go on. What "
        "is still wrong is said below, with the line it will have in the file, as you type.",
        ["n", "(the Eiffel Tower)", "Tab", "(Everyone knows that {} is in)"],
        "target_new",
    ),
    (
        "A paraphrase must be answered the same way, a locality probe must keep its answer, a portability probe asks "
        "for what follows. They are how the edit is measured.",
        [
            *("Tab", "(Rome)", "Tab", "(Paris)", "Tab", "(Today {} can be found in the city of)"),
            *("Tab", "(Everyone knows that the Louvre is in => Paris)"),
            *("Tab", "([reasoning] The country where {} can be found is => Italy)"),
        ],
        "no problems",
    ),
    (
        "`ctrl+s` saves. The file in `specs/` is an ordinary TOML file, which you may as well change in an editor "
        "(`e`); what changes there is shown here at once.",
        ["C-s"],
        "1 new",
    ),
    (
        "A second one, shorter:",
        [
            *("n", "(Nintendo)", "Tab", "({} has its headquarters in)", "Tab", "(Vienna)"),
            *("Tab", "(Kyoto)", "C-s"),
        ],
        "2 new",
    ),
    (
        "## 2. Plan\n\n"
        "`a` stages both (`space` stages one), `p` goes to the plan. Nothing has been changed yet. The model is loaded "
        "in a process of its own and asked what it says now, and how probable the new and the old target are.",
        ["a", "p"],
        "100.0 %",
    ),
    (
        "## 3. Apply\n\n"
        "`g` asks. The answer that goes on is `y`, not `g` again, and return says no. `m` writes down why.",
        ["g", "m", "(The great moving of April)", "Enter"],
        "The great moving of April",
    ),
    (
        "`y`, and the run begins in another process: you can go to any other place meanwhile, and `esc` here asks "
        "whether to cancel it. The store changes at the very end or not at all.",
        ["y"],
        "Measuring which directions",
    ),
    ("A little later:", [], "^ *Made version"),
    (
        "## 4. Review\n\n"
        "`enter` (or `4`) shows what the model said before and says now, in its own words, edit by edit; on the right "
        "the metrics and every single prompt.",
        ["Enter"],
        "reliability",
    ),
    (
        "Suppose Nintendo shall stay in Kyoto after all: `j` goes to it, `r` marks it as rejected.",
        ["j", "r"],
        "1 to reject",
    ),
    (
        "`g` carries the marks out, again after a question. What is rejected is solved away from what is stored, "
        "without a gradient; the rest is asked again.",
        ["g"],
        "Carry out the verdicts",
    ),
    ("", ["y"], r"run +reject[\s\S]+^ *Made version"),
    (
        "## 5. History\n\n"
        "`5` lists every operation, newest first, with who, when and why; `v` switches to the versions as a graph.",
        ["5"],
        "reject",
    ),
    (
        "`u` takes the last operation back, from any place. The model is what it was before to the last bit, and what "
        "was undone stays in the list.",
        ["u"],
        "Undid operation 2",
    ),
    ("`ctrl+r` brings it back.", ["C-r"], "Redid operation 2"),
    (
        "## 6. Ask\n\n`6` asks the unedited model and the head side by side. Type a prompt and press return.",
        ["6", "(The city that is home to the Eiffel Tower is)", "Enter"],
        "%",
    ),
    (
        "`esc` leaves the line, `v` adds another version, `s` saves the prompt as a probe of an edit. `q` leaves "
        "editctl; everything is in `specs/` and `store/`, and the command line sees the same: `editctl log`, `editctl "
        'show`, `editctl ask "…"`.',
        ["Escape", "q"],
        LEFT,
    ),
]


def tmux(*words: str) -> str:
    """What a tmux command prints."""
    done = subprocess.run(["tmux", "-L", "editctl-tutorial", *words], capture_output=True, text=True, check=True)
    return done.stdout


def screen() -> str:
    """What the terminal shows."""
    return "\n".join(line.rstrip() for line in tmux("capture-pane", "-p", "-t", "tutorial").splitlines()).rstrip()


def seen(text: str, at_rest: float = 0.7) -> str:
    """The screen once it shows a text and has not changed for a moment.

    Raises:
        SystemExit: it never does.
    """
    begun, before, since = time.monotonic(), "", time.monotonic()
    while time.monotonic() - begun < PATIENCE:
        now = screen()
        if now != before:
            before, since = now, time.monotonic()
        if re.search(text, now, re.MULTILINE) and time.monotonic() - since > at_rest:
            return now
        time.sleep(0.1)
    raise SystemExit(f"{text!r} is not on the screen:\n{before}")


def main() -> None:
    """Play the session and write the page."""
    program = Path(sys.executable).with_name("editctl")
    folder = Path(tempfile.mkdtemp(prefix="facts-"))
    environment = {**os.environ, "LOGNAME": "you", "PS1": "$ ", "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
    command = f"cd {folder} && clear && {program}; printf '$ '; sleep 60"
    new = ["tmux", "-L", "editctl-tutorial", "-f", "/dev/null", "new-session", "-d", "-s", "tutorial"]
    subprocess.run([*new, "-x", str(WIDTH), "-y", str(HEIGHT), "sh", "-c", command], env=environment, check=True)
    parts = []
    try:
        for words, keys, expected in STEPS:
            for key in keys:
                tmux("send-keys", "-t", "tutorial", *(("-l", key[1:-1]) if key.startswith("(") else (key,)))
                time.sleep(0.35)
            now = seen(expected, 0.2 if expected.startswith("Measuring") else 0.7)
            print(f"ok: {expected}")
            picture = [] if expected == LEFT else [f"```text\n{now}\n```"]
            parts += [*filter(None, [words]), *picture]
        (written,) = (folder / "specs").glob("*.toml")
        parts.append(f"What the form wrote:\n\n```toml\n{written.read_text(encoding='utf-8').rstrip()}\n```")
    finally:
        tmux("kill-server")
        shutil.rmtree(folder)
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
