"""The asyncio process beside the trainers: who is connected, which save may use which slot, what the executor is asked to do."""
