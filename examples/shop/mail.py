"""Mails, sent one at a time."""

from __future__ import annotations

import smtplib
from dataclasses import dataclass
from email.message import EmailMessage


@dataclass(frozen=True)
class Mailer:
    host: str
    port: int

    def send(self, to: str, subject: str, text: str) -> None:
        mail = EmailMessage()
        mail["From"], mail["To"], mail["Subject"] = "shop@example.org", to, subject
        mail.set_content(text)
        with smtplib.SMTP(self.host, self.port) as smtp:
            smtp.send_message(mail)
