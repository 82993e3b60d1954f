"""A Megatron checkpoint (torch_dist or torch) to an HF directory; on a CPU, without Megatron.

python tools/convert_torch_dist_to_hf.py --input-dir ./run/iter_0000100 --output-dir ./hf --origin-hf-dir ./Qwen3-4B
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from slime.cli.convert import main_torch_dist_to_hf

if __name__ == "__main__":
    sys.exit(main_torch_dist_to_hf())
