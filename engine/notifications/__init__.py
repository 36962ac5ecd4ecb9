"""Notifications about runs: who gets them, at which addresses, and their delivery. Knows nothing of runs themselves.

    policy          what the operator permits           subscriptions   users' addresses and events
    services        which addresses there are           notice          what a notification says
    sending         asks the child process that sends   sender          that process
    sealing         what the sender may reach           responses       what services really answered

What has happened to a run, and whether that has been sent, is found out by `engine.runs`. The sender alone imports
apprise, which knows some hundred services.
"""
