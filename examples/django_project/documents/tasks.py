import hashlib

from django.tasks import task

from documents.models import Document


@task
def fingerprint(pk: int) -> str:
    document = Document.objects.get(pk=pk)
    with document.file.open() as file:
        document.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    document.save(update_fields=["sha256"])
    return document.sha256
