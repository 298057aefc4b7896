"""What reflection is told about the task."""

from pathlib import Path

from megatron_p2o.config.tree import Config

FILE_ENDINGS = (".txt", ".md")


def task_description_of(config: Config, task: str) -> str | None:
    """Return the description of a task of `data.train`: its own, else that of `evolution.reflection`.

    None for boxed final answers, which need none, "" where nobody wrote one.

    Raises:
        ValueError: the setting names a file that cannot be read.
    """
    own = config.data.train[task].description
    setting = "evolution.reflection.task_description" if own is None else f"data.train.{task}.description"
    given = config.evolution.reflection.task_description if own is None else own
    if given is None:
        return None if config.grading_of(task).function_names == ("math",) else ""
    if not given.endswith(FILE_ENDINGS):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{setting}={given} cannot be read ({error}): give a text file") from error
