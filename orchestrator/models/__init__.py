"""The words of the HTTP contract: requests and responses, shared by server, SDK and CLI; a module for each subject."""

from orchestrator.models.contexts import *
from orchestrator.models.events import *
from orchestrator.models.executions import *
from orchestrator.models.files import *
from orchestrator.models.network import *
from orchestrator.models.operations import *
from orchestrator.models.sessions import *
from orchestrator.models.terminals import *
from orchestrator.models.terms import *
