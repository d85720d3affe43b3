"""worker: the GPU process of one endpoint. It pulls a job, renders it, uploads and reports.

Needs       NATS and S3; no database
Pulls       inference.run_job from the queue of its endpoint: one when it is idle, more when nobody
            else waits for them
Hears       inference.job_* of the jobs in hand, so that it drops what nobody wants any more
Says        inference.report_job_started, report_job_succeeded, report_job_failed,
            endpoints.report_instance; progress of steps and previews on core NATS
Runs        torch in a child process (`child.py`), so that its crash, hang or long C call costs one
            attempt at one job, and neither heartbeats nor the connection to the bus
"""
