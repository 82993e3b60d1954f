"""An HF directory to a Megatron checkpoint that loads at any parallel layout; on a CPU, without Megatron.

source scripts/models/qwen3-4B.sh
python tools/convert_hf_to_torch_dist.py ${MODEL_ARGS[@]} --hf-checkpoint ./Qwen3-4B --save ./Qwen3-4B_torch_dist
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from slime.cli.convert import main_hf_to_torch_dist

if __name__ == "__main__":
    sys.exit(main_hf_to_torch_dist())
