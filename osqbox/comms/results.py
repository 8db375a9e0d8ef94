"""What a result that an agent reports does to its command. Pure.

| the command is   | code 2            | a final code     | ``Agent's database failure``, delivered more than once |
|------------------|-------------------|------------------|--------------------------------------------------------|
| not the agent's  | foreign           | foreign          | foreign                                                |
| open             | taken: in_progress| taken: it ends   | repeated: the agent had it already                     |
| success, failed  | repeated          | repeated         | repeated                                               |
| expired, cancelled | ended           | ended            | ended                                                  |
"""

from __future__ import annotations

from .messages import OPEN_STATES, Command, CommandStatus, Result, ResultOutcome

SUCCESS = 0
IN_PROGRESS = 2

DATABASE_FAILURE = "Agent's database failure"
"""The C++ agent keeps commands by document_id: one that is delivered again cannot be inserted and gets this result."""


def judge(command: Command | None, agent: str, result: Result) -> tuple[ResultOutcome, CommandStatus | None]:
    """What became of the result, and the command's status from now on: None changes nothing."""
    if command is None or command.agent != agent:
        return ResultOutcome.FOREIGN, None
    if command.status in (CommandStatus.EXPIRED, CommandStatus.CANCELLED):
        return ResultOutcome.ENDED, None
    if command.status not in OPEN_STATES or _is_repetition(command, result):
        return ResultOutcome.REPEATED, None
    if result.code == IN_PROGRESS:
        return ResultOutcome.TAKEN, CommandStatus.IN_PROGRESS
    return ResultOutcome.TAKEN, CommandStatus.SUCCESS if result.code == SUCCESS else CommandStatus.FAILED


def _is_repetition(command: Command, result: Result) -> bool:
    return result.code not in (SUCCESS, IN_PROGRESS) and result.message == DATABASE_FAILURE and command.deliveries > 1
