"""The package alpaca-eval, run as a separate process in the environment that has it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from qrpo_core.common.errors import ConfigError, EngineError
from qrpo_core.rewards.alpaca_eval import worker_main

#: The variables of the environment that the process gets: those of the hub's cache and of proxies, no keys.
_KEPT = frozenset(
    {"PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"}
    | {"HF_HOME", "HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy"}
)
_PREFIXES = ("HF_HUB_", "XDG_")

_VERSION = "import importlib.metadata as m; print(m.version('alpaca-eval'))"
_WHERE = "reward.alpaca_eval.python"


def interpreter(python: str | None) -> str:
    """Return the path of an interpreter, given it or its virtual environment; None is this one."""
    if python is None:
        return sys.executable
    path = Path(python).expanduser().absolute()
    return str(path / "bin" / "python" if path.is_dir() else path)


@lru_cache
def version(python: str | None) -> str:
    """Return the version of alpaca-eval; raises ConfigError if it is not installed."""
    try:
        found = subprocess.run(
            [interpreter(python), "-P", "-c", _VERSION],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"{python!r} is not a working Python interpreter ({type(error).__name__})",
            where=_WHERE,
            remedy="name the folder of a virtual environment, or its python",
        ) from None
    if found.returncode:
        where = "this environment" if python is None else repr(python)
        raise ConfigError(
            f"reward kind 'alpaca_eval' needs the package alpaca-eval, and {where} lacks it",
            where=_WHERE,
            remedy="pip install 'qrpo[alpaca-eval]', or install alpaca-eval in an environment of its own and "
            "name that here",
        )
    return found.stdout.strip()


class Package:
    """The package's process, started at the first question."""

    def __init__(self, python: str | None) -> None:
        self._python = python
        self._process: subprocess.Popen[str] | None = None

    def ask(self, do: str, **request: Any) -> Any:
        """Return the answer to a question (see `worker_main`). Raises EngineError with what went wrong."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:
            # An interrupt between question and answer would hand this answer to the next question.
            process.kill()
            self.close()
            raise
        if not line:
            self.close()
        reply = json.loads(line) if line else {"error": "its process ended"}
        if "error" in reply:
            raise EngineError(f"alpaca-eval failed: {reply['error']}", where=f"alpaca_eval, {do}")
        return reply["value"]

    def close(self) -> None:
        """End the process; it may be used again."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(BrokenPipeError):
                process.communicate()  # its input ends, and so does it

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            version(self._python)
            kept = {
                name: value
                for name, value in os.environ.items()
                if name in _KEPT or name.startswith(_PREFIXES)
            }
            self._process = subprocess.Popen(
                # -P: the script's own folder must not shadow modules of the standard library.
                [interpreter(self._python), "-P", "-W", "ignore", worker_main.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="ascii",
                env=kept | {"OMP_NUM_THREADS": "1"},
            )
        return self._process


@lru_cache
def described(python: str | None, annotator: str) -> dict[str, Any]:
    """Return the annotator's own judge, `model`, and the `fields` of its requests.

    Raises ConfigError if the package does not load or has no such annotator.
    """
    try:
        with contextlib.closing(Package(python)) as package:
            found: dict[str, Any] = package.ask("describe", annotator=annotator)
            return found
    except EngineError as error:
        raise ConfigError(error.message, where="reward.alpaca_eval.annotator") from None


@lru_cache
def reach_length_data(python: str | None, where: str) -> int:
    """Return for how many instructions the length-controlled win rate is defined.

    Raises ConfigError where the package's data is neither in the hub's cache nor to be fetched.
    """
    try:
        with contextlib.closing(Package(python)) as package:
            return int(package.ask("reach"))
    except EngineError as error:
        raise ConfigError(
            f"the length-controlled win rate needs df_gamed.csv of the data set tatsu-lab/alpaca_eval "
            f"({error.message})",
            where=where,
            remedy="fetch it into the hub's cache (hf download tatsu-lab/alpaca_eval df_gamed.csv "
            "--repo-type dataset), or set length_controlled: false",
        ) from None
