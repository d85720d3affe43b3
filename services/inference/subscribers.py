"""Message type -> function: all that the ledger does when spoken to."""

from __future__ import annotations

from functools import partial

from services.inference import commands, reactions
from services.inference.commands import Wake
from services.inference.reactions import EmptyQueue
from shared.bus import Handlers
from shared.contracts import endpoints, inference, models
from shared.objects import Objects


def commands_with(objects: Objects, wake: Wake) -> Handlers:
    return {
        inference.CreateJob: commands.create_job,
        inference.StartJob: partial(commands.start_job, objects=objects),
        inference.CancelJob: partial(commands.cancel_job, wake=wake),
        inference.DeleteJobs: partial(commands.delete_jobs, wake=wake),
        inference.ReportJobStarted: commands.report_job_started,
        inference.ReportJobSucceeded: partial(commands.report_job_succeeded, wake=wake),
        inference.ReportJobFailed: partial(commands.report_job_failed, wake=wake),
        inference.ResyncInference: commands.resync,
    }


def reactions_with(empty_queue: EmptyQueue, wake: Wake) -> Handlers:
    on_endpoint_event = partial(reactions.on_endpoint_event, empty_queue=empty_queue, wake=wake)
    return {
        models.CheckpointCreated: reactions.on_checkpoint_event,
        models.CheckpointActivated: reactions.on_checkpoint_event,
        models.CheckpointChanged: reactions.on_checkpoint_event,
        models.CheckpointFailed: reactions.on_checkpoint_event,
        models.CheckpointDeleted: reactions.on_checkpoint_event,
        models.CheckpointSynced: reactions.on_checkpoint_event,
        endpoints.EndpointCreated: on_endpoint_event,
        endpoints.EndpointInService: on_endpoint_event,
        endpoints.EndpointChanged: on_endpoint_event,
        endpoints.EndpointFailed: on_endpoint_event,
        endpoints.EndpointDeleted: on_endpoint_event,
        endpoints.EndpointSynced: on_endpoint_event,
    }
