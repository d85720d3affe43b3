"""worker: the GPU process of one endpoint. It pulls a job, renders it, uploads and reports.

Needs       NATS and S3; no database
Pulls       inference.run_job from the queue of its endpoint, one at a time
Says        inference.report_job_started, report_job_succeeded, report_job_failed,
            endpoints.report_instance, and progress of steps on core NATS
Runs        torch in a child process (`child.py`), so that its crash, hang or long C call costs one
            attempt at one job, and neither heartbeats nor the connection to the bus
"""
