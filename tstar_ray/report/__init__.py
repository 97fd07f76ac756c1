"""One self-contained HTML file that shows a run, or an experiment of several, to people.

    run folder ──run_folder, analyze──► summary (numbers) ──► figures (matplotlib) ──┐
                                         viewer (traces, token texts) ───────────────┼──► page (jinja2) ──► report.html
                                                                                     └──► figures/*.svg, *.png

The file needs no network and no other file: figures are inline SVG that follows the light or dark theme, the trace
viewer is a page of plain JavaScript over JSON. `python -m tstar_ray.report RUN` writes it.
"""

from tstar_ray.report.experiment import write_experiment_report as write_experiment_report
from tstar_ray.report.page import write_run_report as write_run_report
