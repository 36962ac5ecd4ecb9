"""How often the encoding of a short text is detected correctly: `python -m bench.encodings`, which takes seconds.

Uses windows of texts in nine languages, plain and as a table, in each of their usual encodings. chardet, as the studio
uses it, with the share of answers it calls sure and the number of wrong ones among them, is compared with
charset-normalizer and, if installed, faust-cchardet. Correct means that all characters are decoded correctly.
"""

from __future__ import annotations

import importlib
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from engine.core.problems import Refusal
from engine.data import encodings

LENGTHS = (10, 30, 60, 120, 250, 500)  # characters
WINDOWS_PER_TEXT = 24  # windows of each length, text and encoding
TEXTS = {
    "zh-cn": (
        ["gb18030"],
        (
            "请用一句话解释什么是机器学习。机器学习是让计算机从数据中总结规律，并用这些规律对新的情况作出判断的方法。"
            "如何煮一碗好吃的面条？先把水烧开，放入少许盐，再把面条下锅，煮到没有硬心时捞出，浇上酱汁即可。"
            "为什么天空是蓝色的？因为阳光中的蓝光波长较短，更容易被空气分子散射，所以我们看到的天空呈现蓝色。"
            "请把下面的句子翻译成英文：明天早上八点我们在图书馆门口见面。请写一封邮件，告诉客户货物已经发出，"
            "预计三天之内送达，如果有问题可以随时联系客服。北京的冬天干燥寒冷，室内一般有暖气，出门要戴帽子和手套。"
            "推荐三本适合初学者阅读的历史书，并说明理由。电脑开机以后没有声音，应该先检查音量是否被关闭，"
            "再检查驱动程序是否正常。怎样才能养成早起的习惯？晚上尽量早睡，睡前少看手机，把闹钟放在离床较远的地方。"
        ),
    ),
    "zh-tw": (
        ["big5"],
        (
            "請用一句話解釋什麼是機器學習。機器學習是讓電腦從資料中歸納規律，並用這些規律對新的情況作出判斷的方法。"
            "如何煮一碗好吃的麵？先把水燒開，放入少許鹽，再把麵條下鍋，煮到沒有硬心時撈出，淋上醬汁即可。"
            "為什麼天空是藍色的？因為陽光中的藍光波長較短，更容易被空氣分子散射，所以我們看到的天空呈現藍色。"
            "請把下面的句子翻譯成英文：明天早上八點我們在圖書館門口見面。請寫一封郵件，告訴客戶貨物已經寄出，"
            "預計三天之內送達，如果有問題可以隨時聯絡客服。臺北的冬天潮濕陰冷，室內通常沒有暖氣，出門要記得帶傘"
            "和外套。推薦三本適合初學者閱讀的歷史書，並說明理由。電腦開機以後沒有聲音，應該先檢查音量是否被關閉，"
            "再檢查驅動程式是否正常。怎樣才能養成早起的習慣？晚上盡量早睡，睡前少看手機，把鬧鐘放在離床較遠的地方。"
        ),
    ),
    "ja": (
        ["cp932", "euc_jp"],
        (
            "機械学習とは何かを一文で説明してください。機械学習とは、コンピューターがデータから規則性を見つけ、"
            "それを使って新しい状況を判断する方法です。おいしいうどんの作り方を教えてください。まずお湯を沸かし、"
            "塩を少し入れてから麺をゆで、芯がなくなったらざるに上げて、つゆをかけます。空はなぜ青いのですか。太陽"
            "の光のうち青い光は波長が短く、空気の分子によって散乱されやすいからです。次の文を英語に翻訳してください。"
            "明日の朝八時に図書館の入口で会いましょう。お客様に商品を発送したことを知らせるメールを書いてください。"
            "三日以内に届く予定ですので、何かございましたらいつでもご連絡ください。東京の冬は乾燥していて寒いですが、"
            "晴れの日が多いです。初心者に向いている歴史の本を三冊すすめて、その理由も説明してください。"
            "パソコンの音が出ないときは、まず音量がゼロになっていないか確かめ、次にドライバーを確認します。"
        ),
    ),
    "ko": (
        ["cp949"],
        (
            "기계 학습이 무엇인지 한 문장으로 설명해 주세요. 기계 학습은 컴퓨터가 데이터에서 규칙을 "
            "찾아 새로운 상황을 판단하는 데 쓰는 방법입니다. 맛있는 국수를 끓이는 방법을 알려 주세요. "
            "먼저 물을 끓이고 소금을 조금 넣은 다음 면을 삶아 건져서 양념장을 얹으면 됩니다. "
            "하늘은 왜 파란색인가요? 햇빛 가운데 파란빛은 파장이 짧아서 공기 분자에 더 쉽게 흩어지기 때문입니다. "
            "다음 문장을 영어로 번역해 주세요. 내일 아침 여덟 시에 도서관 앞에서 만납시다. 고객에게 상품을 "
            "발송했다는 메일을 써 주세요. 사흘 안에 도착할 예정이며 문제가 있으면 언제든지 연락해 주시기 바랍니다. "
            "서울의 겨울은 건조하고 추우며 집 안에는 보통 난방이 있습니다. 처음 읽는 사람에게 알맞은 역사책 세 권을 "
            "추천하고 이유를 설명해 주세요. 컴퓨터에서 소리가 나지 않으면 먼저 음량을 확인하고 드라이버를 점검합니다."
        ),
    ),
    "de": (
        ["cp1252", "latin-1"],
        (
            "Erkläre in einem Satz, was maschinelles Lernen ist. Beim maschinellen Lernen findet der Rechner "
            "Regeln in den Daten und wendet sie auf neue Fälle an. Wie kocht man gute Nudeln? Zuerst bringt "
            "man Wasser zum Kochen, gibt etwas Salz dazu und lässt die Nudeln so lange ziehen, bis sie bissfest sind. "
            "Warum ist der Himmel blau? Weil das kurzwellige blaue Licht stärker gestreut wird als das rote. "
            "Übersetze den folgenden Satz: Morgen früh um acht treffen wir uns vor der Bücherei. "
            "Schreibe dem Kunden, dass die Ware verschickt wurde und voraussichtlich in drei Tagen ankommt; "
            "für Rückfragen stehen wir gern zur Verfügung. Die Winter in München sind "
            "kalt, und abends wird es früh dunkel. Grüße aus Österreich, schöne Straßen, größere Häuser."
        ),
    ),
    "fr": (
        ["cp1252", "latin-1"],
        (
            "Expliquez en une phrase ce qu'est l'apprentissage automatique. L'apprentissage automatique "
            "permet à l'ordinateur de trouver des règles dans les données et de les appliquer à de nouveaux cas. "
            "Comment préparer de bonnes pâtes ? Faites d'abord bouillir l'eau, ajoutez un peu de sel, "
            "puis laissez cuire jusqu'à ce qu'elles soient tendres. Pourquoi le ciel est-il bleu ? "
            "Parce que la lumière bleue, de courte longueur d'onde, est davantage diffusée par l'air. "
            "Traduisez : demain matin à huit heures, nous nous retrouverons devant la bibliothèque. "
            "Écrivez au client que le colis a été expédié et qu'il arrivera d'ici trois jours. "
            "L'été dernier, ma mère a préféré rester à la maison, près de la forêt, où l'on dîne très tôt."
        ),
    ),
    "es": (
        ["cp1252", "latin-1"],
        (
            "Explica en una frase qué es el aprendizaje automático. El aprendizaje automático permite que "
            "el ordenador encuentre reglas en los datos y las aplique a casos nuevos. ¿Cómo se prepara "
            "una buena pasta? Primero se hierve el agua, se añade un poco de sal y se cuece hasta que esté tierna. "
            "¿Por qué el cielo es azul? Porque la luz azul tiene una longitud de onda más corta y el aire la "
            "dispersa más. Traduce: mañana por la mañana, a las ocho, nos vemos delante de la biblioteca. "
            "Escribe al cliente que el envío salió ayer y llegará en tres días. "
            "El niño pequeño soñó con una montaña y un pingüino; después comió jamón y bebió café."
        ),
    ),
    "ru": (
        ["cp1251", "koi8-r"],
        (
            "Объясните одним предложением, что такое машинное обучение. Машинное обучение позволяет компьютеру "
            "находить закономерности в данных и применять их к новым случаям. Как сварить хорошую лапшу? Сначала "
            "вскипятите воду, добавьте немного соли и варите до готовности. Почему небо голубое? Потому что "
            "голубой свет имеет меньшую длину волны и сильнее рассеивается воздухом. Переведите на английский: "
            "завтра утром в восемь часов мы встретимся у входа в библиотеку. Напишите клиенту, что товар отправлен и "
            "прибудет в течение трёх дней. Зимой в Москве холодно, поэтому нужно надевать шапку и тёплые перчатки."
        ),
    ),
    "pl": (
        ["cp1250"],
        (
            "Wyjaśnij w jednym zdaniu, czym jest uczenie maszynowe. "
            "Uczenie maszynowe pozwala komputerowi znaleźć reguły w danych i stosować je w nowych przypadkach. "
            "Jak ugotować dobry makaron? Najpierw zagotuj wodę, dodaj trochę soli i gotuj, aż będzie miękki. "
            "Dlaczego niebo jest niebieskie? Ponieważ światło niebieskie ma krótszą falę i silniej się rozprasza. "
            "Przetłumacz: jutro rano o ósmej spotkamy się przed biblioteką. Napisz do klienta, że paczka "
            "została wysłana i dotrze w ciągu trzech dni. Zażółć gęślą jaźń; źrebię śpi w cieniu dużej gruszy."
        ),
    ),
}


def windows(length: int, draw: random.Random) -> Iterator[tuple[str, str]]:
    """Texts of this length with their encodings; ASCII texts are left out because any encoding fits."""
    for codecs, text in TEXTS.values():
        for codec in codecs:
            for number in range(WINDOWS_PER_TEXT):
                at = draw.randrange(max(1, len(text) - length))
                window = text[at : at + length]
                if number % 2:
                    half = len(window) // 2
                    window = f"instruction,output\n{window[:half].replace(',', '')},{window[half:]}\n"
                if not window.encode(codec).isascii():
                    yield codec, window


def ours(content: bytes) -> tuple[str | None, bool]:
    with tempfile.NamedTemporaryFile(suffix=".csv") as file:
        file.write(content)
        file.flush()
        try:
            detected = encodings.encoding_of(Path(file.name))
        except Refusal:
            return None, False
        return detected.codec, detected.sure


def peers() -> dict[str, Callable[[bytes], tuple[str | None, bool]]]:
    from charset_normalizer import from_bytes

    def normalizer(content: bytes) -> tuple[str | None, bool]:
        best = from_bytes(content).best()
        return best.encoding if best else None, False

    detectors = {"charset-normalizer": normalizer}
    try:
        cchardet = importlib.import_module("cchardet")
    except ImportError:
        return detectors
    return detectors | {"faust-cchardet": lambda content: (cchardet.detect(content)["encoding"], False)}


def main() -> None:
    for name, detect in ({"the studio": ours} | peers()).items():
        for length in LENGTHS:
            texts = right = sure = wrong = 0
            for codec, text in windows(length, random.Random(length)):
                content = text.encode(codec)
                detected, certain = detect(content)
                try:
                    good = bool(detected) and content.decode(detected) == text
                except (LookupError, UnicodeDecodeError):
                    good = False
                texts, right, sure, wrong = (
                    texts + 1,
                    right + good,
                    sure + certain,
                    wrong + (certain and not good),
                )
            print(
                f"{name:20} {length:4} characters: {right / texts:6.1%} of "
                f"{texts} right, {sure / texts:5.1%} sure, {wrong} of them wrong"
            )


if __name__ == "__main__":
    main()
