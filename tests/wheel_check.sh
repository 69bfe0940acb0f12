#!/usr/bin/env bash
# Build a wheel with the given Python's hatchling, install it in a fresh environment, and run it outside the checkout.
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
cd "$(dirname "$0")/.."
elsewhere=$(mktemp -d)
trap 'rm -rf "$elsewhere"' EXIT
"$python" -m hatchling build --target wheel --directory "$elsewhere"
"$python" -m venv "$elsewhere/venv"
# The packages of this environment are lent to the fresh one, all but slm itself, which comes from the wheel.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
fresh=$("$elsewhere/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$elsewhere/venv/bin/python" -m pip --disable-pip-version-check --quiet install --no-deps --no-index "$elsewhere"/slm-*.whl
for entry in "$site"/*; do
  name=$(basename "$entry")
  case "$name" in
    *slm*|pip*|__pycache__) ;;
    *) [ -e "$fresh/$name" ] || ln -s "$entry" "$fresh/$name" ;;
  esac
done
cd "$elsewhere"
export SLM_HOME=$elsewhere/runs
venv/bin/python -c "import slm, store, sys; assert all('$elsewhere' in m.__file__ for m in (slm, store)), slm.__file__"
venv/bin/slm --version
venv/bin/slm sweep --recipe pocket --depths 1 --steps 5 --json > sweep.json
grep -q '"trained"' sweep.json
venv/bin/slm status
venv/bin/slm report > report.txt
grep -q '^report: ' report.txt
echo "wheel-check: the wheel installs, sweeps and reports outside the checkout"
