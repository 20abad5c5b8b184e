"""YAML as people write settings: mappings, lists and texts. No value is anything else, so that `no` stays "no"."""

from typing import Any

import yaml


class _Plain(yaml.BaseLoader):  # type: ignore[misc]
    """Without anchors, whose repetition can make a small file endless, and with every key once."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="an alias (*) is not read", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key is no text: a value that begins with { or [ needs quotes"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r:.40} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=True)


def parse_yaml(text: str) -> Any:
    """The value of YAML text: dicts, lists and strings; None for an empty text.

    Raises:
        ValueError: it is no YAML, is nested too deeply, has a key twice, or an alias; one line.
    """
    try:
        return yaml.load(text, Loader=_Plain)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f"line {mark.line + 1}: "
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        raise ValueError(f"{place}{' '.join(str(problem).split()):.120}") from None
