"""The files that notebooks written for the earlier layer-lens system read, and the typed table.

`write_run_files` writes, for one model (NAME is the text after the last `/` of its id):

    output-NAME-layers.parquet                     the typed table; everything else follows from it
    output-NAME-records.csv                        every position: entropy and top tokens
    output-NAME-pure-next-token.csv                the last position: every statistic and flag
    output-NAME-records-LENS.csv                   the same two files for LENS = prism, tuned;
    output-NAME-pure-next-token-LENS.csv           the tuned lens without row 0
    output-NAME-pure-next-token-rawlens.csv        raw beside norm, every row
    output-NAME-pure-next-token-rawlens-window.csv raw beside norm, around the milestones
    output-NAME-pure-next-token-tuned-variants.csv what each part of the tuned lens gains, by layer
    output-NAME-positions-tuned-audit.csv          what it gains at other positions
    output-NAME-milestones.csv                     four milestones of the baseline prompt
    output-NAME-artifact-audit.csv                 raw against norm, baseline prompt, with the score
    output-NAME.json                               summary, provenance, guidance; strict JSON

Names, columns, order and CSV dialect are those of the earlier system; `docs/compat.md` lists where
values differ, and why. A file whose rows need a lens or a check that was not run is not written.
Every file is complete or absent.
"""

from layerscope.reports.files.write import write_failure, write_run_files

__all__ = ["write_failure", "write_run_files"]
