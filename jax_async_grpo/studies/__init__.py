"""Studies: questions with the rule of the answer declared before the run, one module and one page in docs/laws/ each.

A study is a module of functions; `launch.study` runs any of them from its config (`configs/study_<name>.py`):

    validate(config) -> None                        raises ValueError, one line, on what cannot be run
    pieces(config) -> list[str]                     names of the pieces of work, in the order in which they run
    run(config, workdir, on_piece) -> None          runs the pieces that metrics.jsonl lacks; on_piece(name, seconds) after each
    summary(rows, config, sources) -> dict          everything the page says, recomputed from rows alone
    page(summary) -> str                            Markdown; numbers from the summary only
    figures(rows, summary, folder) -> list[Path]    PNG and SVG, as the page calls them

`config.study` is the module's dotted name; `config.sources` are folders of other studies whose rows it reads, handed to
`summary` as {name of the folder: rows}. Every row has `kind` and `piece`, and the last row of a piece has kind "piece": a piece
without it does not count. `run_pieces` writes rows this
way. The page shows a figure as `![words](figures:name.png)`, whatever folder it will lie in; `save_figure` writes both formats.
"""

from jax_async_grpo.studies.contract import (
    finished_pieces,
    load_study,
    page_text,
    read_sources,
    run_pieces,
    save_figure,
    write_results,
)

__all__ = ["finished_pieces", "load_study", "page_text", "read_sources", "run_pieces", "save_figure", "write_results"]
