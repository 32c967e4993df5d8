# Sourced by the other scripts: makes .venv when it is missing or out of date, and puts it first on PATH.
# Uses uv where it is installed, and python's own venv and pip elsewhere. Set PYTHON to choose the interpreter.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "Python 3.11, 3.12 or 3.13 is needed and was not found; set PYTHON to its path." >&2
  return 1
}

make_environment() {
  local stamp wanted python
  stamp=.venv/.installed
  wanted="$PWD $(cat pyproject.toml constraints.txt | cksum)"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    return
  fi
  echo "Installing into .venv (a few minutes the first time) ..." >&2
  if command -v uv >/dev/null; then
    [ -x .venv/bin/python ] || { python=$(find_python) && uv venv --quiet --python "$python" .venv; }
    uv pip install --quiet --python .venv/bin/python -c constraints.txt -e ".[dev]"
  else
    [ -x .venv/bin/pip ] || { python=$(find_python) && "$python" -m venv --clear .venv; }
    .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
  fi
  echo "$wanted" >"$stamp"
}

make_environment
export PATH="$PWD/.venv/bin:$PATH"
