"""What clients, sessions and contexts can be asked for: each method once, for those that await and those that block."""

from orchestrator.calls import contexts, executions, files, operations, running, sessions
from orchestrator.sdk.twins import followed, of_context, of_session, sent


class ClientMethods:
    """What both clients have in common."""

    create_session = sent(sessions.create_session)
    get_session = sent(sessions.get_session)
    list_sessions = sent(sessions.list_sessions)
    extend_session = sent(sessions.extend_session)
    session_network = sent(sessions.session_network)
    end_session = sent(sessions.end_session)
    execute_code = sent(executions.execute_code)
    execute_command = sent(executions.execute_command)
    install_packages = sent(executions.install_packages)
    execute = sent(executions.execute)
    start = sent(running.start)
    stream = followed(running.stream)
    events = followed(running.events)
    send_stdin = sent(running.send_stdin)
    list_executions = sent(executions.list_executions)
    get_execution = sent(executions.get_execution)
    cancel = sent(executions.cancel)
    list_files = sent(files.list_files)
    read_file = sent(files.read_file)
    write_file = sent(files.write_file)
    make_directory = sent(files.make_directory)
    rename_file = sent(files.rename_file)
    delete_file = sent(files.delete_file)
    read_archive = sent(files.read_archive)
    write_archive = sent(files.write_archive)
    create_context = sent(contexts.create_context)
    list_contexts = sent(contexts.list_contexts)
    get_context = sent(contexts.get_context)
    restart_context = sent(contexts.restart_context)
    delete_context = sent(contexts.delete_context)
    templates = sent(operations.templates)
    pool = sent(operations.pool)
    isolation = sent(operations.isolation)
    health = sent(operations.health)
    ready = sent(operations.ready)


class SessionMethods:
    """What a session has of its client, with its id given."""

    run = of_session(ClientMethods.execute_code)
    command = of_session(ClientMethods.execute_command)
    install = of_session(ClientMethods.install_packages)
    start = of_session(ClientMethods.start)
    stream = of_session(ClientMethods.stream)
    events = of_session(ClientMethods.events)
    send_stdin = of_session(ClientMethods.send_stdin)
    list_executions = of_session(ClientMethods.list_executions)
    get_execution = of_session(ClientMethods.get_execution)
    extend = of_session(ClientMethods.extend_session)
    cancel = of_session(ClientMethods.cancel)
    list_files = of_session(ClientMethods.list_files)
    read_file = of_session(ClientMethods.read_file)
    write_file = of_session(ClientMethods.write_file)
    make_directory = of_session(ClientMethods.make_directory)
    rename_file = of_session(ClientMethods.rename_file)
    delete_file = of_session(ClientMethods.delete_file)
    read_archive = of_session(ClientMethods.read_archive)
    write_archive = of_session(ClientMethods.write_archive)


class ContextMethods:
    """What a context has of its client, with its session's id and its own given."""

    read = of_context(ClientMethods.get_context)
    restart = of_context(ClientMethods.restart_context)
    delete = of_context(ClientMethods.delete_context)
