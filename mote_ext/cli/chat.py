"""The chat of mote generate: questions and answers in turn. Of earlier turns the model sees the plain answers alone."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from mote_ext.cli.answering import Answerer, path_names
from mote_ext.cli.errors import CommandError
from mote_ext.cli.generate import parse_path, show_answer
from mote_ext.cli.screen import Screen

HELP = """\
/path NAME   answer by this path from now on:
             {paths}, or stage names with commas
/path        which one it is
/reset       forget the conversation
/quit        leave (or Ctrl-D); Ctrl-C stops an answer
A question that begins with a slash: put a blank before it."""


class Chat:
    """A conversation on two screens: answers on one, remarks on the other."""

    def __init__(self, answerer: Answerer, screen: Screen, notices: Screen) -> None:
        self.answerer, self.screen, self.notices = answerer, screen, notices
        self.messages: list[dict[str, str]] = []
        self.remembers = bool(getattr(answerer.tokenizer, "chat_template", None))

    def run(self) -> None:
        """Until /quit, or the end of stdin."""
        with suppress(ImportError):
            import readline  # noqa: F401  (input() then has lines to edit and to go back to)
        self.remark("/help says what else can be typed; /quit leaves")
        if not self.remembers:
            self.remark("this tokenizer has no chat template: every question stands alone")
        while (line := self._read()) is not None:
            if line.startswith("/"):
                if not self._obey(line):
                    return
            elif line.strip():
                self._ask(line.strip())

    def remark(self, text: str) -> None:
        self.notices.line(text, "dim")

    def _read(self) -> str | None:
        """A line, or None at the end; Ctrl-C drops what is being typed."""
        prompt = self.screen.paint("you> ", "bold")
        if self.screen.coloured:  # readline must not count the codes as columns
            prompt = "\x01" + prompt.replace("you> ", "\x02you> \x01") + "\x02"
        while True:
            try:
                return input(prompt)
            except EOFError:
                self.screen.line()
                return None
            except KeyboardInterrupt:
                self.screen.line()

    def _ask(self, question: str) -> None:
        earlier = self.messages if self.remembers else []
        asked = [*earlier, {"role": "user", "content": question}]
        try:
            answer = show_answer(self.answerer, asked, self.screen, self.notices)
        except KeyboardInterrupt:
            self.remark("stopped; this turn is forgotten")
            return
        except ValueError as error:  # what cannot be answered does not end the conversation
            self.notices.line(str(error), "red")
            return
        self.messages = [*asked, {"role": "assistant", "content": answer.plain(self.answerer.table)}]
        self.screen.line()

    def _obey(self, line: str) -> bool:
        """Does what a line with a slash says; False when it says to leave."""
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return False
        if command == "/reset":
            self.messages = []
            self.remark("forgotten")
        elif command == "/path":
            self._take_path(rest.strip())
        elif command == "/help":
            self.remark(HELP.format(paths=", ".join(path_names(self.answerer.table))))
        else:
            self.remark(f"there is no {command}; /help says what there is")
        return True

    def _take_path(self, name: str) -> None:
        if not name:
            path = self.answerer.wishes.path
            self.remark("none" if path is None else ", ".join(path) if isinstance(path, tuple) else path)
            return
        wishes = replace(self.answerer.wishes, path=parse_path(name))
        try:
            wishes.require_sense(self.answerer.model.config)
        except (CommandError, ValueError) as error:
            self.notices.line(str(error), "red")
            return
        self.answerer.wishes = wishes
        self.remark(f"path {name}")
