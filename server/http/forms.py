"""What an answer must look like, as OpenAI's and vLLM's clients say it."""

from collections.abc import Callable, Iterator
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from ...engine_impl.errors import RefusedError
from ..request.form import check_one, read_json, structural_tag
from ..request.grammar import MAX_CHOICES, Grammar
from .errors import BadFieldError
from .fields import Strict, few

Schema = dict[str, Any] | bool
Choices = Annotated[list[str], *few(MAX_CHOICES)]

Made = tuple[str, Callable[[], Grammar]]
"""A field, and the grammar that it asks for. Raises RefusedError."""


class JsonSchema(Strict):
    """OpenAI's. `strict` changes nothing: answers always follow the schema."""

    model_config = ConfigDict(strict=True, populate_by_name=True)

    content: Schema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's, and vLLM's `structural_tag`."""

    type: str
    json_schema: JsonSchema | None = None
    structures: list[Any] | None = None
    triggers: list[Any] | None = None

    def made(self) -> Iterator[Made]:
        """Nothing for a text."""
        name = "response_format"
        match self.type:
            case "text":
                return
            case "json_object":
                yield name, Grammar.of_json_object
            case "json_schema":
                if self.json_schema is None:
                    raise BadFieldError(f"{name}.json_schema", f"{name}.json_schema is missing")
                schema = self.json_schema.content
                yield name, lambda: Grammar.of_json_schema(schema)
            case "structural_tag":
                tag = {"structures": self.structures, "triggers": self.triggers}
                yield name, lambda: structural_tag(name, tag)
            case _:
                known = "text, json_object, json_schema or structural_tag"
                raise BadFieldError(f"{name}.type", f"{name}.type={self.type[:80]!r} must be {known}")


class StructuredOutputs(Strict):
    """vLLM's."""

    model_config = ConfigDict(strict=True, populate_by_name=True)

    schema_or_text: Schema | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def made(self) -> Iterator[Made]:
        """Raises BadFieldError for what would change the answer and that we lack."""
        at = "structured_outputs"
        for name in ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"):
            if getattr(self, name):
                raise BadFieldError(f"{at}.{name}", f"{at}.{name} is not supported; leave it out")
        yield from forms(f"{at}.", self.schema_or_text, self.regex, self.choice, self.grammar)
        if self.json_object:
            yield f"{at}.json_object", Grammar.of_json_object
        if (tag := self.structural_tag) is not None:
            name = f"{at}.structural_tag"
            yield name, lambda: structural_tag(name, read_json(name, tag))


class Forms(Strict):
    """The fields of a body."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None

    def grammar(self) -> Grammar | None:
        """What is asked for. Raises BadFieldError, also for two at once."""
        made = [*(self.response_format.made() if self.response_format else ())]
        made += self.structured_outputs.made() if self.structured_outputs else ()
        made += forms("guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        if not made:
            return None
        (name, make), *_ = made
        try:
            check_one([name for name, _ in made])
            return make()
        except RefusedError as error:
            raise BadFieldError(name, str(error)) from error


def forms(
    at: str, schema: Schema | str | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> Iterator[Made]:
    """Of vLLM's fields of one prefix."""
    if schema is not None:
        name = f"{at}json"
        yield name, lambda: Grammar.of_json_schema(read_json(name, schema) if isinstance(schema, str) else schema)
    if regex is not None:
        yield f"{at}regex", lambda: Grammar.of_regex(regex)
    if choice is not None:
        yield f"{at}choice", lambda: Grammar.of_choices(choice)
    if grammar is not None:
        yield f"{at}grammar", lambda: Grammar.of_lark(grammar)
