"""Execute notebooks in place and put a PNG beside every plotly figure, so that code hosts show it.

    python tools/run_notebooks.py nbs/12_plots.ipynb nbs/tutorials/*.ipynb
    python tools/run_notebooks.py --pictures nbs/12_plots.ipynb   # draw the stored figures again, run nothing
"""
import argparse, base64, io
from pathlib import Path

import kaleido, nbformat
import plotly.graph_objects as go
from nbclient import NotebookClient
from PIL import Image

PLOTLY, PNG = "application/vnd.plotly.v1+json", "image/png"

def execute(nb, folder):
    "Run all cells; widget state is not kept, one live figure would be megabytes"
    NotebookClient(nb, timeout=900, kernel_name="python3", store_widget_state=False, resources=dict(metadata=dict(path=str(folder)))).execute()
    for c in nb.cells: c.metadata.pop("execution", None)

def small(png):
    "The same picture in 256 colours of its own: a quarter of the bytes, and no colour is off by more than an eye sees"
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(out, "png", optimize=True)
    return min(png, out.getvalue(), key=len)

def add_pictures(nb):
    "How many figures got a PNG"
    figures = [o["data"] for c in nb.cells for o in c.get("outputs", []) if PLOTLY in o.get("data", {})]
    for data in figures:
        fig = go.Figure(data[PLOTLY]["data"], data[PLOTLY]["layout"], skip_invalid=True)
        data[PNG] = base64.b64encode(small(fig.to_image("png", scale=1))).decode() + "\n"
    return len(figures)

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--pictures", action="store_true", help="draw the stored figures again, run nothing")
    ap.add_argument("notebooks", nargs="+", type=Path)
    asked = ap.parse_args()
    kaleido.start_sync_server()
    for path in asked.notebooks:
        nb = nbformat.read(path, as_version=4)
        if not asked.pictures: execute(nb, path.parent)
        n = add_pictures(nb)
        nb.metadata = dict(kernelspec=dict(display_name="python3", language="python", name="python3"))
        nbformat.write(nb, path)
        print(f"{path}: {n} figure(s)", flush=True)
    kaleido.stop_sync_server()

if __name__ == "__main__": main()
