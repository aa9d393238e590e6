#!/bin/sh
# Sets up the checkout that this file is in on a TPU VM, whose own Python is too old.
set -eu
cd "$(dirname "$0")/.."
test -x .venv/bin/python || {
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --python 3.12 .venv
}
python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu,gcs]'
