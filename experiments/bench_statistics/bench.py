"""How long does the whole report on a direction take at the size of a 27B model? 62 layers x 5,376 numbers x 720 responses.

    python bench.py        # one process, all cores; writes results.json
"""
import datetime, json, platform, resource, time
from pathlib import Path

import numpy as np
import torch

from persona_vectors.statistics import direction_report

LAYERS, WIDTH, ROWS, QUESTIONS, HERE = 62, 5376, 360, 40, Path(__file__).resolve().parent

def main():
    generator = torch.Generator().manual_seed(0)
    on, off = (torch.randn(ROWS, LAYERS, WIDTH, generator=generator) for _ in range(2))
    on[:, 20:40, :100] += .2  # something to find
    questions = np.repeat(np.arange(QUESTIONS), ROWS // QUESTIONS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.time(); report = direction_report(on, off, questions, questions, bootstrap=1000, permutations=1000, progress=True)
    seconds, peak = time.time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = dict(date=str(datetime.date.today()), machine=f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}", seconds=round(seconds, 1), limit_seconds=60,
                  peak_gb=round(peak / 1e6, 2), of_which_activations_gb=round(before / 1e6, 2), limit_gb=4, best=str(report.best))
    (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n"); print(json.dumps(result, indent=1))

if __name__ == "__main__": main()
