"""Import and export hold one tensor at a time: peak memory of real processes, net of what they hold before."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoint.huggingface.published import write_published
from tests.reference.looplm import ReferenceConfig, ReferenceLoopLM

SMALL = ReferenceConfig(layers=1, hidden=32, heads=4, ffn=48, vocab=128, loops=2)
LARGE = ReferenceConfig(layers=16, hidden=512, heads=8, ffn=1408, vocab=2048, loops=2)

SCRIPT = """
import json, sys
from pathlib import Path
from ouro_megatron.checkpoint.huggingface.importer import import_pretrained
from ouro_megatron.checkpoint.huggingface.export import ExportSettings, export

def both(source, where):
    import_pretrained(source, where / "imported")
    after_import = status("VmHWM")
    reset()
    before_export = status("VmRSS")
    export(where / "imported", where / "exported", ExportSettings(check=False))
    return after_import, before_export, status("VmHWM")

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

def reset():
    Path("/proc/self/clear_refs").write_text("5")

small, large, where = map(Path, sys.argv[1:])
both(small, where / "small")  # whatever is imported or allocated once
reset()
before = status("VmRSS")
after_import, before_export, after_export = both(large, where / "large")
print(json.dumps({"import": after_import - before, "export": after_export - before_export}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_below_the_largest_shard(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name, config in (("small", SMALL), ("large", LARGE)):
        model = ReferenceLoopLM(config).to(torch.bfloat16)
        write_published(tmp_path / name, dict(model.state_dict()), config)
    shard = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert shard > 100e6
    arguments = [str(tmp_path / "small"), str(tmp_path / "large"), str(tmp_path / "out")]
    result = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr
    peak = json.loads(result.stdout)
    assert peak["import"] < 1.3 * shard and peak["export"] < 1.3 * shard
    # The promise is 1.3 shards; one tensor at a time is far less: gate and up in bf16 and fp32 are 9 MB here.
    assert peak["import"] < 0.5 * shard and peak["export"] < 0.5 * shard, peak
