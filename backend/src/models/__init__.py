"""The twelve relational tables; importing this makes `Base.metadata` complete."""

from src.models.action import ActionStatus, PendingAction
from src.models.auth import OAuthAccount, Passkey, PasswordResetToken
from src.models.conversation import Conversation, ConversationMemory, Message, MessageRole
from src.models.document import Document, DocumentStatus
from src.models.fact import UserFact
from src.models.trace import Trace, TraceStep
from src.models.user import User

__all__ = [
    "ActionStatus",
    "Conversation",
    "ConversationMemory",
    "Document",
    "DocumentStatus",
    "Message",
    "MessageRole",
    "OAuthAccount",
    "Passkey",
    "PasswordResetToken",
    "PendingAction",
    "Trace",
    "TraceStep",
    "User",
    "UserFact",
]
