"""Why the agent cannot answer. The messages are shown to whoever asked."""

from __future__ import annotations


class AgentError(Exception):
    """The agent cannot do what was asked; the message says what to do next."""


class AgentUnavailableError(AgentError):
    """No chat model is set up on this installation."""


class AgentBusyError(AgentError):
    """As many answers are being written as this process writes at once."""


class AgentFailedError(AgentError):
    """The run broke off; sending the message again may work."""


class ConversationNotFoundError(AgentError):
    """The user has no conversation of that id."""
