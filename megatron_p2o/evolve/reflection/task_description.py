"""What reflection is told about the task."""

from pathlib import Path

from megatron_p2o.config.tree import Config

FILE_ENDINGS = (".txt", ".md")


def task_description_of(config: Config) -> str | None:
    """Return the description of the task; None for boxed final answers, which need none, "" where nobody wrote one.

    Raises:
        ValueError: `evolution.reflection.task_description` names a file that cannot be read.
    """
    given = config.evolution.reflection.task_description
    if given is None:
        rewards = [config.grading_of(name).function_names for name in config.data.train]
        return None if all(each == ("math",) for each in rewards) else ""
    if not given.endswith(FILE_ENDINGS):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"evolution.reflection.task_description={given} cannot be read ({error}): give a text file"
        ) from error
