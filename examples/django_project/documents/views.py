from functools import partial

from django.core.mail import send_mail
from django.db import transaction
from django.http import HttpRequest, JsonResponse
from django.shortcuts import aget_object_or_404
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from asgi_deferred import defer
from documents.models import Document
from documents.tasks import fingerprint


@csrf_exempt  # for curl
@require_POST
def upload(request: HttpRequest) -> JsonResponse:
    if "file" not in request.FILES or "email" not in request.POST:
        return JsonResponse({"error": "Send a file and an email."}, status=400)
    with transaction.atomic():
        document = Document.objects.create(file=request.FILES["file"], email=request.POST["email"])
        transaction.on_commit(partial(fingerprint.enqueue, document.pk))
    defer(send_mail, "We have your document", f"It is number {document.pk}.", None, [document.email])
    return JsonResponse({"id": document.pk}, status=202)


async def document(request: HttpRequest, pk: int) -> JsonResponse:
    found = await aget_object_or_404(Document, pk=pk)
    return JsonResponse({"id": found.pk, "sha256": found.sha256})
